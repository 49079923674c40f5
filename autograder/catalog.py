"""The forty lessons in order, in their six stages, and what each one stands on.

`requires` names what a lesson uses directly. It never points forward, so the picture of dependencies has no cycle.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    number: int
    folder: str
    title: str
    title_zh: str
    about: str


@dataclass(frozen=True)
class Entry:
    number: int
    name: str  # also the file's name without its ending
    title: str
    title_zh: str
    requires: tuple[int, ...]
    stage: Stage

    @property
    def key(self) -> str:
        """`stage2_transformer/09_attention_mha_mqa_gqa`: where the lesson lies in solutions/, course/ and build/."""
        return f"{self.stage.folder}/{self.name}"


STAGES = (
    Stage(1, "stage1_foundations", "Foundations", "深度学习基石与数学原语",
          "Everything later is read with these six: high dimensions, gradients, activations, normalization, "
          "losses, optimizers."),
    Stage(2, "stage2_transformer", "The Transformer, taken apart", "Transformer 架构微观拆解",
          "Every tensor's shape, every mainstream variant."),
    Stage(3, "stage3_pretraining", "Pretraining and scaling", "预训练与扩增定律",
          "How a base model is made."),
    Stage(4, "stage4_alignment", "Post-training and alignment", "后训练与对齐",
          "From a base model to one that follows instructions, each method seen to work on a small real model."),
    Stage(5, "stage5_inference", "Inference and systems", "推理加速与系统优化",
          "Fast, and small in memory."),
    Stage(6, "stage6_frontier", "The frontier", "前沿架构与未来",
          "After the Transformer, and beyond text."),
)  # fmt: skip

# (stage, name, title, Chinese title, direct prerequisites)
_LESSONS = (
    (1, "01_high_dimensional_intuition", "Geometry of high-dimensional space", "高维空间的数学直觉", ()),
    (1, "02_automatic_differentiation", "Automatic differentiation and computation graphs", "自动微分与计算图", (1,)),
    (1, "03_activation_functions", "Activation functions and gated units", "激活函数演变史", (2,)),
    (1, "04_normalization", "Normalization", "归一化技术详解", (2,)),
    (1, "05_losses_and_distributions", "Losses and probability distributions", "损失函数与概率分布", (2,)),
    (1, "06_optimizers", "Optimizers", "优化算法的深层逻辑", (2,)),
    (2, "07_tokenization", "Tokenization", "Tokenization 深度解析", (5,)),
    (2, "08_embeddings_and_positions", "Embeddings and positional encoding", "Embedding 与位置编码", (1, 3, 7)),
    (2, "09_attention_mha_mqa_gqa", "Attention I: MHA, MQA, GQA", "Attention 家族 上", (1, 8)),
    (2, "10_attention_mla_sparse", "Attention II: MLA, sliding window, sparse attention", "Attention 家族 下", (9,)),
    (2, "11_ffn_and_moe", "FFN and mixture of experts", "FFN 与 MoE", (3, 5)),
    (2, "12_architecture_variants", "Architecture variants", "Transformer 架构变体总览", (4, 9)),
    (2, "13_initialization", "Initialization and training dynamics", "初始化策略", (4, 6)),
    (2, "14_building_a_llama", "Building a model, line by line", "代码级模型构建", (9, 11, 13)),
    (3, "15_data_engineering", "Data engineering", "数据工程", (7,)),
    (3, "16_pretraining_objectives", "Pretraining objectives", "预训练目标与策略", (14,)),
    (3, "17_scaling_laws", "Scaling laws", "Scaling Laws", (14,)),
    (3, "18_mixed_precision", "Mixed-precision training", "混合精度训练", (14,)),
    (3, "19_distributed_data_parallel", "Distributed training I: data parallel, ZeRO, FSDP", "分布式训练基础", (14,)),
    (3, "20_distributed_model_parallel",
     "Distributed training II: tensor, pipeline, sequence, expert parallel", "分布式训练进阶", (19,)),
    (4, "21_supervised_finetuning", "Instruction tuning", "指令微调 SFT", (16,)),
    (4, "22_rlhf_reward_models", "RLHF", "RLHF", (21,)),
    (4, "23_ppo_and_grpo", "PPO in detail, and GRPO", "PPO 算法数学细节", (22,)),
    (4, "24_dpo_and_variants", "DPO and its variants", "DPO 及其变体", (22,)),
    (4, "25_peft_lora_qlora", "Parameter-efficient finetuning", "PEFT", (18, 21)),
    (4, "26_long_context", "Long-context finetuning", "长上下文微调", (8, 21)),
    (4, "27_model_merging", "Model merging", "模型合并", (21,)),
    (5, "28_kv_cache", "The KV cache", "KV Cache 机制全解", (10, 14)),
    (5, "29_flash_attention", "FlashAttention", "FlashAttention", (3, 9)),
    (5, "30_paged_attention", "PagedAttention and vLLM", "PageAttention", (28, 29)),
    (5, "31_quantization", "Quantization", "量化技术", (18,)),
    (5, "32_speculative_decoding", "Speculative decoding", "推测采样", (16, 28)),
    (5, "33_distillation", "Distillation", "模型蒸馏", (21,)),
    (5, "34_serving", "Serving", "Serving 架构", (30, 32)),
    (6, "35_linear_attention", "Linear attention", "线性 Attention", (10,)),
    (6, "36_ssm_mamba", "State-space models and Mamba", "SSM 与 Mamba", (35,)),
    (6, "37_hybrid_architectures", "Hybrid architectures", "混合架构", (36,)),
    (6, "38_vision_language_models", "Vision–language models", "多模态 VLM 架构", (21,)),
    (6, "39_video_and_audio", "Video and audio models", "Video 与 Audio 大模型", (38,)),
    (6, "40_toward_agi", "Toward AGI: reasoning, search, agents, evaluation", "迈向 AGI", (23, 32)),
)  # fmt: skip

LESSONS = tuple(
    Entry(int(name[:2]), name, title, title_zh, requires, STAGES[stage - 1])
    for stage, name, title, title_zh, requires in _LESSONS
)
BY_NUMBER = {entry.number: entry for entry in LESSONS}
BY_KEY = {entry.key: entry for entry in LESSONS}


class UsageError(Exception):
    """The request makes no sense; the message says which one would."""


class NoSuchLesson(UsageError):
    """The lesson or stage asked for is not there."""


def select(lesson: str | None = None, stage: str | None = None) -> list[Entry]:
    """The catalog's lessons meant by what someone typed; see `select_keys`."""
    return [BY_KEY[key] for key in select_keys(BY_KEY, lesson, stage)]


def select_keys(keys: Iterable[str], lesson: str | None = None, stage: str | None = None) -> list[str]:
    """Those of the keys, `<stage>/<lesson>`, that someone means who typed this.

    A lesson is named by its number (`9`, `09`), its name, or the path of a file of it; a stage by its number (`2`) or
    its folder. Raises NoSuchLesson, which names the lessons that there are, where nothing is left.
    """
    keys = list(keys)
    chosen = keys
    if stage:
        chosen = [key for key in chosen if stage in (key.split("/")[0], re.sub(r"^stage(\d+).*", r"\1", key))]
    if lesson:
        name = lesson.removesuffix(".py").removesuffix(".ipynb").replace("\\", "/").rsplit("/", 1)[-1]
        number = name.zfill(2) if name.isdecimal() else None
        chosen = [key for key in chosen if key.split("/")[1] == name or key.split("/")[1].split("_")[0] == number]
    if not chosen:
        asked = " in ".join(f'{what} "{typed}"' for what, typed in (("lesson", lesson), ("stage", stage)) if typed)
        raise NoSuchLesson(f"there is no {asked}. There are:\n  " + "\n  ".join(keys))
    return chosen
