# Right and wrong answers to the exercises of lesson 38: see CONTRIBUTING.md.

# %% wrong="patchify" because="a patch is written row, column, channel"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

# %% wrong="patchify" because="patches come column by column"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return cut.permute(0, 4, 2, 1, 3, 5).flatten(3).flatten(1, 2)

# %% wrong="patchify" because="reshaped without a permutation"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return images.reshape(batch, -1, channels * patch**2)

# %% wrong="patchify" because="rows and columns inside a patch are exchanged"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return cut.permute(0, 2, 4, 1, 5, 3).flatten(3).flatten(1, 2)

# %% wrong="patchify" because="F.unfold, which knows floating-point numbers only"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return F.unfold(images.float(), patch, stride=patch).mT

# %% wrong="patchify" because="the rest is cut off, without an error"
- if height % patch or width % patch:
-     raise ValueError(f"{height} × {width} pixels cannot be cut into patches of {patch}")
+ images = images[:, :, : height // patch * patch, : width // patch * patch]

# %% wrong="patchify" because="unpatchify takes images for squares"
- rows, columns = height // patch, width // patch
+ rows = columns = int(count**0.5)

# %% wrong="patchify" because="unpatchify does not look at the number of patches"
- if (rows * patch, columns * patch) != (height, width) or count != rows * columns:
+ if (rows * patch, columns * patch) != (height, width):

# %% wrong="patchify" because="unpatchify does not look at height and width"
- if (rows * patch, columns * patch) != (height, width) or count != rows * columns:
+ if count != rows * columns:

# %% wrong="patchify" because="unpatchify reads a patch as row, column, channel"
- cut = patches.reshape(batch, rows, columns, size // patch**2, patch, patch)
- return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // patch**2, height, width)
+ cut = patches.reshape(batch, rows, columns, patch, patch, size // patch**2)
+ return cut.permute(0, 5, 1, 3, 2, 4).reshape(batch, size // patch**2, height, width)

# %% wrong="patchify" because="through float32: large whole numbers and float64 are rounded"
- return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
+ return F.unfold(images.float(), patch, stride=patch).mT.to(images.dtype)

# %% wrong="patchify" because="unpatchify goes through float64: large whole numbers are rounded"
- return cut.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // patch**2, height, width)
+ rounded = F.fold(patches.double().mT, (height, width), patch, stride=patch)
+ return rounded.to(patches.dtype)

# %% right="patchify" because="Tensor.unfold, and loops back"
def patchify(images, patch):
    if images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError("no multiples of the patch")
    windows = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return windows.movedim(1, 3).flatten(3).flatten(1, 2)


def unpatchify(patches, patch, height, width):
    batch, count, size = patches.shape
    if height % patch or width % patch or size % patch**2:
        raise ValueError("no multiples of the patch")
    if count * patch**2 != height * width:
        raise ValueError("another number of patches")
    rows = []
    per_row = width // patch
    for start in range(0, count, per_row):
        line = [
            patches[:, start + j].reshape(batch, -1, patch, patch) for j in range(per_row)
        ]
        rows.append(torch.cat(line, dim=3))
    return torch.cat(rows, dim=2)

# %% wrong="vision_transformer" because="the class token's position is detached"
- first = (self.class_token + self.positions[0]).expand(len(seen), 1, -1)
+ first = (self.class_token + self.positions[0].detach()).expand(len(seen), 1, -1)

# %% wrong="vision_transformer" because="registers stand behind the patches"
- x = torch.cat([first, scratch, seen], dim=1)
+ x = torch.cat([first, seen, scratch], dim=1)
- return x[:, 0], x[:, 1 + len(self.register_tokens) :]
+ return x[:, 0], x[:, 1 : 1 + seen.shape[1]]

# %% wrong="vision_transformer" because="uniform draws"
- self.positions = nn.Parameter(std * torch.randn(1 + patches, width))
+ self.positions = nn.Parameter(std * 12**0.5 * (torch.rand(1 + patches, width) - 0.5))

# %% wrong="vision_transformer" because="registers get positions, the class token's"
- scratch = self.register_tokens.expand(len(seen), -1, -1)
+ scratch = (self.register_tokens + self.positions[0]).expand(len(seen), -1, -1)

# %% wrong="vision_transformer" because="registers stay in the output"
- return x[:, 0], x[:, 1 + len(self.register_tokens) :]
+ return x[:, 0], x[:, 1:]

# %% wrong="vision_transformer" because="registers are dropped at the wrong end"
- return x[:, 0], x[:, 1 + len(self.register_tokens) :]
+ return x[:, 0], x[:, 1 : len(x[0]) - len(self.register_tokens)]

# %% wrong="vision_transformer" because="the class token has no position"
- first = (self.class_token + self.positions[0]).expand(len(seen), 1, -1)
+ first = self.class_token.expand(len(seen), 1, -1)

# %% wrong="vision_transformer" because="the last norm is left out"
- x = self.norm(x)

# %% wrong="vision_transformer" because="the last norm is the class token's only"
- x = self.norm(x)
- return x[:, 0], x[:, 1 + len(self.register_tokens) :]
+ return self.norm(x[:, 0]), x[:, 1 + len(self.register_tokens) :]

# %% wrong="vision_transformer" because="a mean of the patches instead of the class token"
- return x[:, 0], x[:, 1 + len(self.register_tokens) :]
+ patches = x[:, 1 + len(self.register_tokens) :]
+ return patches.mean(1), patches

# %% wrong="vision_transformer" because="the registers never enter"
- x = torch.cat([first, scratch, seen], dim=1)
+ x = torch.cat([first, 0 * scratch, seen], dim=1)

# %% wrong="vision_transformer" because="only the first block works"
- for block in self.blocks:
-     x = block(x)
+ for block in self.blocks[:1]:
+     x = block(x)

# %% wrong="vision_transformer" because="registers start as zeros, and stay alike"
- self.register_tokens = nn.Parameter(std * torch.randn(registers, width))
+ self.register_tokens = nn.Parameter(torch.zeros(registers, width))

# %% wrong="vision_transformer" because="all registers start as one vector"
- self.register_tokens = nn.Parameter(std * torch.randn(registers, width))
+ self.register_tokens = nn.Parameter((std * torch.randn(1, width)).repeat(registers, 1))

# %% wrong="vision_transformer" because="std is ignored"
- self.positions = nn.Parameter(std * torch.randn(1 + patches, width))
+ self.positions = nn.Parameter(0.02 * torch.randn(1 + patches, width))

# %% wrong="vision_transformer" because="the norm has PyTorch's eps"
- self.norm = nn.LayerNorm(width, eps=1e-6)
+ self.norm = nn.LayerNorm(width)

# %% wrong="vision_transformer" because="a buffer holds the registers: nothing trains them"
- self.register_tokens = nn.Parameter(std * torch.randn(registers, width))
+ self.register_buffer("register_tokens", std * torch.randn(registers, width))

# %% right="vision_transformer" because="a tensor to write into, and torch.split"
class VisionTransformer(nn.Module):
    def __init__(
        self, image_size, patch, channels, width, layers, heads, registers=0, std=0.02
    ):
        super().__init__()
        side = image_size // patch
        self.sizes = (1, registers, side * side)
        self.patch = patch
        self.embed = nn.Linear(channels * patch * patch, width)
        self.class_token = nn.Parameter(torch.empty(width))
        self.register_tokens = nn.Parameter(torch.empty(registers, width))
        self.positions = nn.Parameter(torch.empty(1 + side * side, width))
        for p in (self.class_token, self.register_tokens, self.positions):
            if p.numel():
                nn.init.normal_(p, std=std)
        self.blocks = nn.ModuleList([EncoderBlock(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images):
        tokens = self.embed(patchify(images, self.patch))
        batch, width = tokens.shape[0], tokens.shape[2]
        x = torch.cat([self.class_token.expand(batch, 1, width), tokens], dim=1) + self.positions
        first, tokens = x.split([1, self.sizes[2]], dim=1)
        registers = self.register_tokens[None].repeat(batch, 1, 1)
        x = torch.cat([first, registers, tokens], dim=1)
        for block in self.blocks:
            x = block(x)
        first, _, tokens = self.norm(x).split(self.sizes, dim=1)
        return first.squeeze(1), tokens

# %% wrong="clip_loss" because="the scale is rounded to float32"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T
+ logits = logit_scale.float().exp().to(u.dtype) * u @ v.T

# %% wrong="clip_loss" because="the rows alone"
- return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
+ return F.cross_entropy(logits, own)

# %% wrong="clip_loss" because="the sum of both"
- return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
+ return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

# %% wrong="clip_loss" because="the logarithm is the factor"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T
+ logits = logit_scale.to(u.dtype) * u @ v.T

# %% wrong="clip_loss" because="a temperature: divided by the factor"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T
+ logits = u @ v.T / logit_scale.to(u.dtype).exp()

# %% wrong="clip_loss" because="texts are not normalized"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = F.normalize(wide(image), dim=-1), wide(text)

# %% wrong="clip_loss" because="normalized over the batch"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = F.normalize(wide(image), dim=0), F.normalize(wide(text), dim=0)

# %% wrong="clip_loss" because="clamped inside the loss: no gradient beyond"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T
+ logits = logit_scale.to(u.dtype).exp().clamp(max=100) * u @ v.T

# %% wrong="clip_loss" because="the scale is detached"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T
+ logits = math.exp(float(logit_scale.detach())) * u @ v.T

# %% wrong="clip_loss" because="half precision all the way"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = F.normalize(image, dim=-1), F.normalize(text, dim=-1)

# %% wrong="clip_loss" because="always float32"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

# %% wrong="clip_loss" because="a softmax, then its logarithm"
- return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
+ p, q = logits.exp(), logits.T.exp()
+ rows = -(p.diagonal() / p.sum(1)).log().mean() - (q.diagonal() / q.sum(1)).log().mean()
+ return rows / 2

# %% wrong="clip_loss" because="the limit is always 100"
- logit_scale.clamp_(max=math.log(most))
+ logit_scale.clamp_(max=math.log(100))

# %% wrong="clip_loss" because="clamped at 100 itself"
- logit_scale.clamp_(max=math.log(most))
+ logit_scale.clamp_(max=most)

# %% wrong="clip_loss" because="clamped below, too"
- logit_scale.clamp_(max=math.log(most))
+ logit_scale.clamp_(0, math.log(most))

# %% wrong="clip_loss" because="the clamped value is returned, and nothing changed"
- with torch.no_grad():
-     logit_scale.clamp_(max=math.log(most))
+ return logit_scale.clamp(max=math.log(most))

# %% wrong="clip_loss" because="its gradient is thrown away"
- with torch.no_grad():
-     logit_scale.clamp_(max=math.log(most))
+ logit_scale.grad = None
+ with torch.no_grad():
+     logit_scale.clamp_(max=math.log(most))

# %% wrong="clip_loss" because="through exp and log: other bits below the limit"
- with torch.no_grad():
-     logit_scale.clamp_(max=math.log(most))
+ with torch.no_grad():
+     logit_scale.copy_(logit_scale.exp().clamp(max=most).log())

# %% wrong="clip_loss" because="what needed no gradient requires one after the clamp"
- with torch.no_grad():
-     logit_scale.clamp_(max=math.log(most))
+ logit_scale.requires_grad_(False)
+ logit_scale.clamp_(max=math.log(most))
+ logit_scale.requires_grad_(True)

# %% wrong="clip_loss" because="eps beside the length: short features shrink"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (wide(image), wide(text)))

# %% right="clip_loss" because="logsumexp and the diagonal"
def clip_loss(image, text, logit_scale):
    kind = torch.promote_types(image.dtype, torch.float32)
    image, text = image.to(kind), text.to(kind)
    u = image / image.norm(dim=1, keepdim=True)
    v = text / text.norm(dim=1, keepdim=True)
    z = torch.einsum("id,jd->ij", u, v) * torch.exp(logit_scale.to(kind))
    return (z.logsumexp(1) + z.logsumexp(0) - 2 * z.diagonal()).mean() / 2


def clamp_logit_scale_(logit_scale, most=100.0):
    limit = math.log(most)
    if float(logit_scale.detach()) > limit:
        logit_scale.data.fill_(limit)

# %% wrong="siglip_loss" because="the bias is rounded to float32"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T + logit_bias.to(u.dtype)
+ logits = logit_scale.to(u.dtype).exp() * u @ v.T + logit_bias.float().to(u.dtype)

# %% wrong="siglip_loss" because="a mean over all pairs"
- return F.softplus(-signs * logits).sum() / len(image)
+ return F.softplus(-signs * logits).mean()

# %% wrong="siglip_loss" because="the sum"
- return F.softplus(-signs * logits).sum() / len(image)
+ return F.softplus(-signs * logits).sum()

# %% wrong="siglip_loss" because="divided by the texts"
- return F.softplus(-signs * logits).sum() / len(image)
+ return F.softplus(-signs * logits).sum() / len(text)

# %% wrong="siglip_loss" because="turned signs"
- return F.softplus(-signs * logits).sum() / len(image)
+ return F.softplus(signs * logits).sum() / len(image)

# %% wrong="siglip_loss" because="the bias is multiplied, too"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T + logit_bias.to(u.dtype)
+ logits = logit_scale.to(u.dtype).exp() * (u @ v.T + logit_bias.to(u.dtype))

# %% wrong="siglip_loss" because="the bias is subtracted"
- logits = logit_scale.to(u.dtype).exp() * u @ v.T + logit_bias.to(u.dtype)
+ logits = logit_scale.to(u.dtype).exp() * u @ v.T - logit_bias.to(u.dtype)

# %% wrong="siglip_loss" because="negatives_only is ignored"
- if not negatives_only:
-     signs.fill_diagonal_(1.0)
+ signs.fill_diagonal_(1.0)

# %% wrong="siglip_loss" because="with negatives_only the diagonal is left out"
- if not negatives_only:
-     signs.fill_diagonal_(1.0)
+ signs.fill_diagonal_(0.0 if negatives_only else 1.0)

# %% wrong="siglip_loss" because="the logarithm of a sigmoid"
- return F.softplus(-signs * logits).sum() / len(image)
+ return -torch.sigmoid(signs * logits).log().sum() / len(image)

# %% wrong="siglip_loss" because="half precision all the way"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = F.normalize(image, dim=-1), F.normalize(text, dim=-1)

# %% wrong="siglip_loss" because="features are not normalized"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = wide(image), wide(text)

# %% wrong="siglip_loss" because="eps beside the length: short features shrink"
- u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
+ u, v = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (wide(image), wide(text)))

# %% right="siglip_loss" because="binary cross-entropy with logits"
def siglip_loss(image, text, logit_scale, logit_bias, negatives_only=False):
    image, text = wide(image), wide(text)
    similarity = F.cosine_similarity(image[:, None], text[None], dim=-1)
    logits = similarity * logit_scale.to(image.dtype).exp() + logit_bias.to(image.dtype)
    targets = torch.zeros_like(logits)
    if not negatives_only:
        targets = torch.eye(len(logits), device=logits.device, dtype=logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(image)

# %% wrong="train_clip" because="weight decay for all parameters"
- {"params": others, "weight_decay": 0.0},
+ {"params": others, "weight_decay": weight_decay},

# %% wrong="train_clip" because="the weight decay is ignored"
- {"params": decayed, "weight_decay": weight_decay},
+ {"params": decayed, "weight_decay": 0.1},

# %% wrong="train_clip" because="a constant learning rate"
- group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * k / steps))
+ group["lr"] = lr

# %% wrong="train_clip" because="the schedule is one step ahead"
- group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * k / steps))
+ group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (k + 1) / steps))

# %% wrong="train_clip" because="the schedule is the first group's only"
- for group in optimizer.param_groups:
+ for group in optimizer.param_groups[:1]:

# %% wrong="train_clip" because="AdamW's own betas"
- optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
+ optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-6)

# %% wrong="train_clip" because="AdamW's own eps"
- optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
+ optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))

# %% wrong="train_clip" because="Adam: decay in the gradient"
- optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
+ optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)

# %% wrong="train_clip" because="the first gradient is added to what was there"
- optimizer.zero_grad()
- value.backward()
+ value.backward()

# %% wrong="train_clip" because="never clamped"
- clamp_logit_scale_(model.logit_scale)

# %% wrong="train_clip" because="clamped before the step"
- optimizer.step()
- clamp_logit_scale_(model.logit_scale)
+ clamp_logit_scale_(model.logit_scale)
+ optimizer.step()

# %% wrong="train_clip" because="drawn with replacement"
- rows = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
+ rows = torch.randint(len(images), (batch_size,), generator=generator).to(images.device)

# %% wrong="train_clip" because="images and captions are drawn apart"
- seen, said = model.encode_image(images[rows]), model.encode_text(captions[rows])
+ seen = model.encode_image(images[rows])
+ rows = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
+ said = model.encode_text(captions[rows])

# %% wrong="train_clip" because="the generator is ignored"
- rows = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
+ rows = torch.randperm(len(images))[:batch_size].to(images.device)

# %% wrong="train_clip" because="the last gradients stay"
- for p in parameters:
-     p.grad = None

# %% wrong="train_clip" because="the model is left in training mode"
- parameters = list(model.parameters())
+ parameters = list(model.train().parameters())

# %% wrong="train_clip" because="losses after the update"
- losses.append(value.item())
+ with torch.no_grad():
+     seen, said = model.encode_image(images[rows]), model.encode_text(captions[rows])
+     losses.append(loss(seen, said, model.logit_scale, model.logit_bias).item())

# %% wrong="train_clip" because="losses are tensors"
- losses.append(value.item())
+ losses.append(value.detach())

# %% wrong="train_clip" because="decay by name: the gains of norms decay"
- decayed = [p for p in parameters if p.dim() >= 2]
- others = [p for p in parameters if p.dim() < 2]
+ free = [n.endswith("bias") or n == "logit_scale" for n, _ in model.named_parameters()]
+ decayed = [p for p, plain in zip(parameters, free, strict=True) if not plain]
+ others = [p for p, plain in zip(parameters, free, strict=True) if plain]

# %% wrong="train_clip" because="decay of matrices only, and not of a convolution's kernel"
- decayed = [p for p in parameters if p.dim() >= 2]
- others = [p for p in parameters if p.dim() < 2]
+ decayed = [p for p in parameters if p.dim() == 2]
+ others = [p for p in parameters if p.dim() != 2]

# %% wrong="train_clip" because="gradients are cleared at the end of a step: none, and they stay"
- for p in parameters:
-     p.grad = None
- return losses
+ if steps:
+     for p in parameters:
+         p.grad = None
+ return losses

# %% right="train_clip" because="LambdaLR, and the decay by hand"
def train_clip(
    model, images, captions, loss, steps, batch_size, lr, generator, weight_decay=0.1
):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for p in model.parameters():
        p.grad = None
    for k in range(steps):
        rate = lr * (1 + math.cos(math.pi * k / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        rows = torch.randperm(len(images), generator=generator)[:batch_size]
        rows = rows.to(images.device)
        value = loss(
            model.encode_image(images[rows]),
            model.encode_text(captions[rows]),
            model.logit_scale,
            model.logit_bias,
        )
        value.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p *= 1 - rate * weight_decay
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        losses.append(float(value.detach()))
    return losses

# %% wrong="zero_shot" because="templates are averaged as they are"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
+ classes = wide(prompts).mean(1)

# %% wrong="zero_shot" because="the mean is not normalized"
- similarity = F.normalize(wide(image), dim=-1) @ F.normalize(classes, dim=-1).T
+ similarity = F.normalize(wide(image), dim=-1) @ classes.T

# %% wrong="zero_shot" because="the best single template decides"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
- similarity = F.normalize(wide(image), dim=-1) @ F.normalize(classes, dim=-1).T
- return similarity.argmax(1)
+ each = F.normalize(wide(prompts), dim=-1) @ F.normalize(wide(image), dim=-1).T
+ return each.amax(1).argmax(0)

# %% wrong="zero_shot" because="the first template alone"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
+ classes = F.normalize(wide(prompts), dim=-1)[:, 0]

# %% wrong="zero_shot" because="a float16 norm overflows"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
+ classes = wide(prompts / prompts.square().sum(-1, keepdim=True).sqrt()).mean(1)

# %% wrong="zero_shot" because="bfloat16 all the way"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
- similarity = F.normalize(wide(image), dim=-1) @ F.normalize(classes, dim=-1).T
+ if image.dtype == torch.float16:
+     image, prompts = image.float(), prompts.float()
+ classes = F.normalize(prompts, dim=-1).mean(1)
+ similarity = F.normalize(image, dim=-1) @ F.normalize(classes, dim=-1).T

# %% wrong="zero_shot" because="of two alike the last"
- return similarity.argmax(1)
+ return similarity.shape[1] - 1 - similarity.flip(1).argmax(1)

# %% wrong="zero_shot" because="the smallest cosine"
- return similarity.argmax(1)
+ return similarity.argmin(1)

# %% wrong="zero_shot" because="float64 goes through float32: near classes tie"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
- similarity = F.normalize(wide(image), dim=-1) @ F.normalize(classes, dim=-1).T
+ classes = F.normalize(prompts.float(), dim=-1).mean(1)
+ similarity = F.normalize(image.float(), dim=-1) @ F.normalize(classes, dim=-1).T

# %% right="zero_shot" because="sums instead of means, one class after another"
def zero_shot(image, prompts):
    image, prompts = image.double(), prompts.double()
    scores = []
    for templates in prompts:
        total = sum(t / t.norm() for t in templates)
        scores.append(image @ (total / total.norm()))
    return torch.stack(scores, dim=1).max(1).indices

# %% wrong="gathered_clip_loss" because="every rank returns the mean of all losses"
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ share = (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ mean = share.detach().clone()
+ dist.all_reduce(mean, group=group)
+ return share - share.detach() + mean / dist.get_world_size(group)

# %% wrong="gathered_clip_loss" because="all_gather alone: gradients of other ranks are lost"
- every_u, every_v = _GatherRows.apply(u, group), _GatherRows.apply(v, group)
+ ranks = range(dist.get_world_size(group))
+ pair = [[torch.empty_like(x) for _ in ranks] for x in (u, v)]
+ dist.all_gather(pair[0], u.detach().contiguous(), group=group)
+ dist.all_gather(pair[1], v.detach().contiguous(), group=group)
+ every_u, every_v = torch.cat(pair[0]), torch.cat(pair[1])

# %% wrong="gathered_clip_loss" because="own rows put back, as for a global loss"
- every_u, every_v = _GatherRows.apply(u, group), _GatherRows.apply(v, group)
+ ranks = range(dist.get_world_size(group))
+ pair = [[torch.empty_like(x) for _ in ranks] for x in (u, v)]
+ for parts, x in zip(pair, (u, v), strict=True):
+     dist.all_gather(parts, x.detach().contiguous(), group=group)
+     parts[dist.get_rank(group)] = x
+ every_u, every_v = torch.cat(pair[0]), torch.cat(pair[1])

# %% wrong="gathered_clip_loss" because="backward takes the mean over the ranks"
- return total.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
+ ranks = dist.get_world_size(ctx.group)
+ return total.chunk(ranks)[dist.get_rank(ctx.group)] / ranks, None

# %% wrong="gathered_clip_loss" because="backward does not sum"
- dist.all_reduce(total, group=ctx.group)

# %% wrong="gathered_clip_loss" because="targets do not know the rank"
- own = torch.arange(len(u), device=u.device) + dist.get_rank(group) * len(u)
+ own = torch.arange(len(u), device=u.device)

# %% wrong="gathered_clip_loss" because="the rank in the world, not in the group"
- own = torch.arange(len(u), device=u.device) + dist.get_rank(group) * len(u)
+ own = torch.arange(len(u), device=u.device) + dist.get_rank() * len(u)

# %% wrong="gathered_clip_loss" because="images alone"
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ return of_images

# %% wrong="gathered_clip_loss" because="each rank computes the whole matrix"
- of_images = F.cross_entropy(factor * u @ every_v.T, own)
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ z = factor * every_u @ every_v.T
+ return (F.cross_entropy(z[own], own) + F.cross_entropy(z.T[own], own)) / 2

# %% wrong="gathered_clip_loss" because="every rank has the loss of the whole batch"
- of_images = F.cross_entropy(factor * u @ every_v.T, own)
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ return clip_loss(every_u, every_v, logit_scale)

# %% wrong="gathered_clip_loss" because="exp without a maximum: inf at CLIP's factor of 100"
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ own = factor * (u * v).sum(-1)
+ of_images = ((factor * u @ every_v.T).exp().sum(1).log() - own).mean()
+ return (of_images + ((factor * v @ every_u.T).exp().sum(1).log() - own).mean()) / 2

# %% wrong="gathered_clip_loss" because="float64 is computed in float32"
- u, v = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
+ u, v = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
- return (of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2
+ return ((of_images + F.cross_entropy(factor * v @ every_u.T, own)) / 2).to(image.dtype)

# %% right="gathered_clip_loss" because="one gather for both, and reduce-scatter by all-to-all"
def gathered_clip_loss(image, text, logit_scale, group=None):
    n = len(image)
    both = torch.stack(
        [image / image.norm(dim=1, keepdim=True), text / text.norm(dim=1, keepdim=True)], dim=1
    )
    every = Everyone.apply(both, group)
    start = dist.get_rank(group) * n
    total = 0.0
    for mine, others in ((0, 1), (1, 0)):
        z = logit_scale.exp() * both[:, mine] @ every[:, others].T
        total = total + (z.logsumexp(1) - z[:, start : start + n].diagonal()).mean()
    return total / 2


class Everyone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.n = group, len(x)
        out = [torch.zeros_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(out, x.contiguous(), group=group)
        return torch.cat(out)

    @staticmethod
    def backward(ctx, g):
        ranks = dist.get_world_size(ctx.group)
        out = [torch.zeros_like(g) for _ in range(ranks)]
        dist.all_gather(out, g.contiguous(), group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.n
        return sum(part[start : start + ctx.n] for part in out), None

# %% wrong="projector" because="a grid is looked at only where something is merged"
- if count != rows * columns or rows % size or columns % size:
+ if size > 1 and (count != rows * columns or rows % size or columns % size):

# %% wrong="projector" because="merges neighbors in the sequence"
- squares = tokens.reshape(batch, rows // size, size, columns // size, size, width)
- return squares.transpose(2, 3).flatten(3).flatten(1, 2)
+ return tokens.reshape(batch, count // size**2, size**2 * width)

# %% wrong="projector" because="column by column inside a square"
- return squares.transpose(2, 3).flatten(3).flatten(1, 2)
+ return squares.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)

# %% wrong="projector" because="the vectors of a square are interleaved, as in patchify"
- return squares.transpose(2, 3).flatten(3).flatten(1, 2)
+ return squares.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)

# %% wrong="projector" because="a mean over the square, repeated"
- return squares.transpose(2, 3).flatten(3).flatten(1, 2)
+ return squares.transpose(2, 3).flatten(3, 4).mean(3).repeat(1, 1, 1, size**2).flatten(1, 2)

# %% wrong="projector" because="the size is always 2"
- squares = tokens.reshape(batch, rows // size, size, columns // size, size, width)
+ size = 2
+ squares = tokens.reshape(batch, rows // size, size, columns // size, size, width)

# %% wrong="projector" because="only the number of tokens is looked at"
- if count != rows * columns or rows % size or columns % size:
+ if count != rows * columns or count % size**2:

# %% wrong="projector" because="unmerge takes the grid for square"
- squares = merged.reshape(batch, rows // size, columns // size, size, size, wide_ // size**2)
+ side = int(count**0.5)
+ squares = merged.reshape(batch, side, count // side, size, size, wide_ // size**2)

# %% wrong="projector" because="unmerge does not look at the grid's sides"
- if count * size**2 != rows * columns or rows % size or columns % size or wide_ % size**2:
+ if count * size**2 != rows * columns or wide_ % size**2:

# %% wrong="projector" because="ReLU"
- return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))
+ return self.second(F.relu(self.first(merge_tokens(patches, self.grid, self.size))))

# %% wrong="projector" because="the approximate GELU"
- return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))
+ x = self.first(merge_tokens(patches, self.grid, self.size))
+ return self.second(F.gelu(x, approximate="tanh"))

# %% wrong="projector" because="GELU behind the second layer, too"
- return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))
+ return F.gelu(self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size)))))

# %% wrong="projector" because="no biases"
- self.second = nn.Linear(width, width)
+ self.second = nn.Linear(width, width, bias=False)

# %% wrong="projector" because="always merges 2 × 2"
- return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))
+ return self.second(F.gelu(self.first(merge_tokens(patches, self.grid))))

# %% wrong="projector" because="merging goes through float64: large whole numbers are rounded"
- squares = tokens.reshape(batch, rows // size, size, columns // size, size, width)
- return squares.transpose(2, 3).flatten(3).flatten(1, 2)
+ squares = tokens.double().reshape(batch, rows // size, size, columns // size, size, width)
+ return squares.transpose(2, 3).flatten(3).flatten(1, 2).to(tokens.dtype)

# %% right="projector" because="indices of the squares, and their inverse permutation"
def square_order(grid, size):
    rows, columns = grid
    places = torch.arange(rows * columns).view(rows, columns)
    parts = [
        places[i : i + size, j : j + size].flatten()
        for i in range(0, rows, size)
        for j in range(0, columns, size)
    ]
    return torch.cat(parts)


def merge_tokens(tokens, grid, size=2):
    if tokens.shape[1] != grid[0] * grid[1] or grid[0] % size or grid[1] % size:
        raise ValueError("the grid does not fit")
    picked = tokens[:, square_order(grid, size).to(tokens.device)]
    return picked.reshape(len(tokens), -1, size * size * tokens.shape[2])


def unmerge_tokens(merged, grid, size=2):
    batch, count, numbers = merged.shape
    if grid[0] % size or grid[1] % size or numbers % size**2:
        raise ValueError("the grid does not fit")
    if count * size**2 != grid[0] * grid[1]:
        raise ValueError("another number of squares")
    tokens = merged.reshape(batch, count * size**2, numbers // size**2)
    back = square_order(grid, size).argsort().to(merged.device)
    return tokens[:, back]


class Projector(nn.Module):
    def __init__(self, vision_width, width, grid, size=1):
        super().__init__()
        self.first = nn.Linear(vision_width * size * size, width)
        self.second = nn.Linear(width, width)
        self.merging = (grid, size)

    def forward(self, patches):
        hidden = self.first(merge_tokens(patches, *self.merging))
        return self.second(nn.GELU()(hidden))

# %% wrong="splice_image_tokens" because="image vectors keep the placeholder's label"
- line += [(pixel + k, IGNORE) for k in range(count)]
+ line += [(pixel + k, aim) for k in range(count)]

# %% wrong="splice_image_tokens" because="counts are not compared"
- if int(is_image.sum()) != len(images):
-     raise ValueError(f"{int(is_image.sum())} placeholders, but {len(images)} images")
+ images = [*images, *images, *images]

# %% wrong="splice_image_tokens" because="too many images are no error"
- if int(is_image.sum()) != len(images):
+ if int(is_image.sum()) > len(images):

# %% wrong="splice_image_tokens" because="always padded on the right"
- lines = [p + line if left else line + p for line, p in zip(lines, paddings, strict=True)]
+ lines = [line + p for line, p in zip(lines, paddings, strict=True)]

# %% wrong="splice_image_tokens" because="the placeholder is embedded"
- words = embed(flat[~is_image])
+ words = embed(flat)[~is_image]

# %% wrong="splice_image_tokens" because="padding has label 0"
- paddings = [[(0, IGNORE)] * (longest - len(line)) for line in lines]
+ paddings = [[(0, 0)] * (longest - len(line)) for line in lines]

# %% wrong="splice_image_tokens" because="the mask hides images, too"
- return F.embedding(pairs[..., 0], pool), pairs[..., 1], pairs[..., 0] > 0
+ places = pairs[..., 0]
+ return F.embedding(places, pool), pairs[..., 1], (places > 0) & (places <= len(words))

# %% wrong="splice_image_tokens" because="the images are detached"
- pool = torch.cat([words.new_zeros(1, words.shape[-1]), words, *images])
+ images = [image.detach() for image in images]
+ pool = torch.cat([words.new_zeros(1, words.shape[-1]), words, *images])

# %% wrong="splice_image_tokens" because="each row begins with the first image again"
def splice_image_tokens(embed, rows, labels, images, placeholder, left=False):
    if sum(int((ids == placeholder).sum()) for ids in rows) != len(images):
        raise ValueError("another number of images")
    parts = []
    for ids, aims in zip(rows, labels, strict=True):
        vectors, targets, which = [], [], 0
        for i in range(len(ids)):
            if int(ids[i]) == placeholder:
                vectors.append(images[which])
                targets.append(torch.full((len(images[which]),), IGNORE, device=ids.device))
                which += 1
            else:
                vectors.append(embed(ids[i : i + 1]))
                targets.append(aims[i : i + 1])
        parts.append((torch.cat([embed(ids[:0]), *vectors]), torch.cat([aims[:0], *targets])))
    side = "left" if left else "right"
    pad = nn.utils.rnn.pad_sequence
    inputs = pad([v for v, _ in parts], batch_first=True, padding_side=side)
    targets = pad([t for _, t in parts], batch_first=True, padding_value=IGNORE, padding_side=side)
    ones = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v, _ in parts]
    return inputs, targets, pad(ones, batch_first=True, padding_side=side)

# %% wrong="splice_image_tokens" because="labels are not spliced: shifted against the inputs"
def splice_image_tokens(embed, rows, labels, images, placeholder, left=False):
    if sum(int((ids == placeholder).sum()) for ids in rows) != len(images):
        raise ValueError("another number of images")
    waiting = iter(images)
    parts = []
    for ids in rows:
        vectors = [embed(ids[:0])]
        for i in range(len(ids)):
            image = int(ids[i]) == placeholder
            vectors.append(next(waiting) if image else embed(ids[i : i + 1]))
        parts.append(torch.cat(vectors))
    side = "left" if left else "right"
    pad = nn.utils.rnn.pad_sequence
    inputs = pad(parts, batch_first=True, padding_side=side)
    targets = torch.full(inputs.shape[:2], IGNORE, device=inputs.device)
    for i, aims in enumerate(labels):
        kept = min(len(aims), targets.shape[1])
        targets[i, :kept] = aims[:kept]
    ones = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in parts]
    return inputs, targets, pad(ones, batch_first=True, padding_side=side)

# %% wrong="splice_image_tokens" because="the rows are changed in place"
- words = embed(flat[~is_image])
+ words = embed(flat[~is_image])
+ for aims, ids in zip(labels, rows, strict=True):
+     aims[ids == placeholder] = IGNORE

# %% wrong="splice_image_tokens" because="the mask is read off the inputs: zero vectors are padding"
- return F.embedding(pairs[..., 0], pool), pairs[..., 1], pairs[..., 0] > 0
+ inputs = F.embedding(pairs[..., 0], pool)
+ return inputs, pairs[..., 1], (inputs != 0).any(-1)

# %% wrong="splice_image_tokens" because="labels go through float64"
- return F.embedding(pairs[..., 0], pool), pairs[..., 1], pairs[..., 0] > 0
+ return F.embedding(pairs[..., 0], pool), pairs[..., 1].double().long(), pairs[..., 0] > 0

# %% right="splice_image_tokens" because="pieces between placeholders, and pad_sequence"
def splice_image_tokens(embed, rows, labels, images, placeholder, left=False):
    images = list(images)
    wanted = sum(row.tolist().count(placeholder) for row in rows)
    if wanted != len(images):
        raise ValueError(f"{wanted} images wanted, {len(images)} given")
    vectors, targets = [], []
    for ids, aims in zip(rows, labels, strict=True):
        x, y, start = [], [], 0
        for place in (ids == placeholder).nonzero().flatten().tolist():
            image = images.pop(0)
            x += [embed(ids[start:place]), image]
            y += [aims[start:place], aims.new_full((image.shape[0],), IGNORE)]
            start = place + 1
        vectors.append(torch.cat([*x, embed(ids[start:])]))
        targets.append(torch.cat([*y, aims[start:]]))
    where = {"batch_first": True, "padding_side": "left" if left else "right"}
    pad = nn.utils.rnn.pad_sequence
    real = [torch.ones(len(v), dtype=torch.bool, device=v.device) for v in vectors]
    return (
        pad(vectors, **where),
        pad(targets, padding_value=IGNORE, **where),
        pad(real, padding_value=False, **where),
    )

# %% wrong="mrope_position_ids" because="goes on from the number of tokens"
- start = int(pieces[-1].max()) + 1
+ start += piece.shape[1]

# %% wrong="mrope_position_ids" because="goes on at the largest number itself"
- start = int(pieces[-1].max()) + 1
+ start = int(pieces[-1].max()) + isinstance(segment, int)

# %% wrong="mrope_position_ids" because="transformers' rule for videos"
- start = int(pieces[-1].max()) + 1
+ start += segment if isinstance(segment, int) else max(segment[1:])

# %% wrong="mrope_position_ids" because="the largest number of the whole is looked at on one axis"
- start = int(pieces[-1].max()) + 1
+ start = int(pieces[-1][2].max()) + 1

# %% wrong="mrope_position_ids" because="grids start at 0"
- pieces.append(start + piece)
+ pieces.append(piece + (start if isinstance(segment, int) else 0))

# %% wrong="mrope_position_ids" because="height and width are exchanged"
- piece = torch.cartesian_prod(*(torch.arange(count) for count in segment)).T
+ piece = torch.cartesian_prod(*(torch.arange(count) for count in segment)).T[[0, 2, 1]]

# %% wrong="mrope_position_ids" because="tokens column by column"
- piece = torch.cartesian_prod(*(torch.arange(count) for count in segment)).T
+ t, h, w = segment
+ piece = torch.cartesian_prod(*(torch.arange(count) for count in (t, w, h))).T[[0, 2, 1]]

# %% wrong="mrope_position_ids" because="empty grids are no error"
- if min(segment) < 1:
-     raise ValueError(f"a grid of {segment} holds no tokens")
+ pass

# %% wrong="mrope_position_ids" because="a negative number of words is no error"
- if segment < 0:
-     raise ValueError(f"there cannot be {segment} text tokens")
+ segment = max(segment, 0)

# %% right="mrope_position_ids" because="three loops"
def mrope_position_ids(segments):
    triples, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            if segment < 0:
                raise ValueError("negative")
            new = [(start + i,) * 3 for i in range(segment)]
        else:
            if any(count <= 0 for count in segment):
                raise ValueError("an empty grid")
            frames, rows, columns = segment
            new = [
                (start + t, start + h, start + w)
                for t in range(frames)
                for h in range(rows)
                for w in range(columns)
            ]
        triples += new
        start = max((max(triple) for triple in new), default=start - 1) + 1
    return torch.tensor(triples, dtype=torch.long).reshape(-1, 3).T

# %% wrong="apply_mrope" because="sections are added up in blocks only"
- if sum(sections) != half:
+ if sum(sections) != half and not interleaved:

# %% wrong="apply_mrope" because="pairs of neighbors"
- first, second = x.to(full).chunk(2, dim=-1)
- cos, sin = angle.cos(), angle.sin()
- return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
+ first, second = x.to(full)[..., ::2], x.to(full)[..., 1::2]
+ cos, sin = angle.cos(), angle.sin()
+ turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
+ return turned.flatten(-2).to(x.dtype)

# %% wrong="apply_mrope" because="turned the other way"
- return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
+ return torch.cat([first * cos + second * sin, second * cos - first * sin], -1).to(x.dtype)

# %% wrong="apply_mrope" because="interleaved is ignored"
- if interleaved:
+ if interleaved and False:

# %% wrong="apply_mrope" because="theta is ignored"
- speed = theta ** (-2 * torch.arange(half, dtype=full, device=x.device) / x.shape[-1])
+ speed = 10_000.0 ** (-2 * torch.arange(half, dtype=full, device=x.device) / x.shape[-1])

# %% wrong="apply_mrope" because="speeds start anew in each section"
- speed = theta ** (-2 * torch.arange(half, dtype=full, device=x.device) / x.shape[-1])
+ place = torch.cat([torch.arange(s) for s in sections]).to(x.device, full)
+ speed = theta ** (-2 * place / x.shape[-1])

# %% wrong="apply_mrope" because="half of the exponent"
- speed = theta ** (-2 * torch.arange(half, dtype=full, device=x.device) / x.shape[-1])
+ speed = theta ** (-torch.arange(half, dtype=full, device=x.device) / x.shape[-1])

# %% wrong="apply_mrope" because="the sections are not compared with the pairs"
- if sum(sections) != half:
-     raise ValueError(f"sections {sections} share out {sum(sections)} pairs; there are {half}")
+ sections = (half - sections[1] - sections[2], *sections[1:])

# %% wrong="apply_mrope" because="interleaved in turn, with sections ignored"
- axis = torch.zeros(half, dtype=torch.int64)
- for which in (1, 2):
-     pairs = which + 3 * torch.arange(sections[which])
-     if len(pairs) and pairs[-1] >= half:
-         raise ValueError(f"sections {sections} reach pair {int(pairs[-1])} of {half}")
-     axis[pairs] = which
+ if 3 * sections[1] - 2 >= half or (sections[2] and 3 * sections[2] - 1 >= half):
+     raise ValueError("beyond the last pair")
+ axis = torch.arange(half) % 3

# %% wrong="apply_mrope" because="pairs beyond the last are left out silently"
- if len(pairs) and pairs[-1] >= half:
-     raise ValueError(f"sections {sections} reach pair {int(pairs[-1])} of {half}")
- axis[pairs] = which
+ axis[pairs[pairs < half]] = which

# %% wrong="apply_mrope" because="width before height"
- axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
+ axis = torch.tensor([0, 2, 1]).repeat_interleave(torch.tensor(sections))

# %% wrong="apply_mrope" because="the first row's positions for the whole batch"
- own = positions.to(full)[axis.to(x.device)]  # (pairs, batch, seq)
+ own = positions[:, :1].to(full)[axis.to(x.device)].expand(-1, len(x), -1)

# %% wrong="apply_mrope" because="angles in half precision"
- full = torch.promote_types(x.dtype, torch.float32)
+ full = x.dtype

# %% wrong="apply_mrope" because="float64 goes through float32"
- full = torch.promote_types(x.dtype, torch.float32)
+ full = torch.float32

# %% wrong="apply_mrope" because="rounded before it is turned"
- cos, sin = angle.cos(), angle.sin()
+ cos, sin = angle.cos().to(x.dtype).to(full), angle.sin().to(x.dtype).to(full)

# %% wrong="apply_mrope" because="whole positions only"
- own = positions.to(full)[axis.to(x.device)]  # (pairs, batch, seq)
+ own = positions.long().to(full)[axis.to(x.device)]  # (pairs, batch, seq)

# %% right="apply_mrope" because="cos and sin of all axes, then chosen; rotate_half"
def apply_mrope(x, positions, sections, interleaved=False, theta=10_000.0):
    pairs = x.shape[-1] // 2
    if sum(sections) != pairs:
        raise ValueError("other sections")
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    speed = 1.0 / theta ** (torch.arange(0, 2 * pairs, 2, device=x.device).to(full) / (2 * pairs))
    angles = positions[..., None].to(full) * speed
    if interleaved:
        if 3 * sections[1] - 2 >= pairs or 3 * sections[2] - 1 >= pairs:
            raise ValueError("beyond the last pair")
        chosen = angles[0].clone()
        for which in (1, 2):
            chosen[..., which : 3 * sections[which] : 3] = angles[
                which, ..., which : 3 * sections[which] : 3
            ]
    else:
        chosen = torch.cat(
            [part[i] for i, part in enumerate(angles.split(list(sections), dim=-1))], dim=-1
        )
    chosen = torch.cat([chosen, chosen], dim=-1)[:, None]
    wide_x = x.to(full)
    turned = torch.cat([-wide_x[..., pairs:], wide_x[..., :pairs]], dim=-1)
    return (wide_x * chosen.cos() + turned * chosen.sin()).to(x.dtype)

# %% wrong="questions" because="patches alone; a scale's logarithm; the positives; all tokens"
- "tokens": (336 // 14) ** 2 + 1 + 4,
- "scale": math.log(32767 / math.expm1(0.01)),
+ "tokens": (336 // 14) ** 2,
+ "scale": math.log(math.log(32767 / math.expm1(0.01))),

- "start": math.log1p(math.exp(10)) + 999 * math.log1p(math.exp(-10)),
- "ratio": 999.0,
- "next": 7 + 20,
+ "start": math.log1p(math.exp(10)),
+ "ratio": 1.0,
+ "next": 7 + 12 * 20,

# %% wrong="questions" because="the scale has a gradient; the others have cosine −1"
- "scale": math.log(32767 / math.expm1(0.01)),
- "stuck": 0.0,
+ "scale": math.log(32767 / math.expm1(0.01)) / 2,
+ "stuck": 1.0,

# %% wrong="questions" because="the image's last position; without merging"
- "next": 7 + 20,
+ "next": 7 + 40,

# %% wrong="questions" because="the positive is counted among the negatives"
- "ratio": 999.0,
+ "ratio": 1000.0,

# %% right="questions" because="rounded"
def questions():
    return {
        "tokens": 581,
        "scale": 15.0,
        "stuck": 0,
        "start": 10.045,
        "ratio": 999,
        "next": 27,
    }


# %% wrong="patchify" because="unpatchify: 'ValueError where height or width is no multiple of `patch`': only the number of pixels is compared"
def patchify(images: Tensor, patch: int) -> Tensor:
    batch, channels, height, width = images.shape
    if height % patch or width % patch:
        raise ValueError(f"{height} x {width} pixels are no multiples of {patch}")
    x = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    x = x.permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, (height // patch) * (width // patch), channels * patch**2)


def unpatchify(patches: Tensor, patch: int, height: int, width: int) -> Tensor:
    batch, count, numbers = patches.shape
    if numbers % patch**2:
        raise ValueError(f"{numbers} numbers are no patches of {patch} x {patch}")
    if count * patch**2 != height * width:
        raise ValueError(f"{count} patches do not make {height} x {width} pixels")
    rows, columns, channels = height // patch, width // patch, numbers // patch**2
    x = patches.reshape(batch, rows, columns, channels, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)

# %% wrong="vision_transformer" because="trunc_normal_ cuts at −2 and 2, which counts where std is large"
- self.class_token = nn.Parameter(std * torch.randn(width))
- self.register_tokens = nn.Parameter(std * torch.randn(registers, width))
- self.positions = nn.Parameter(std * torch.randn(1 + patches, width))
+ self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=std))
+ self.register_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(registers, width), std=std))
+ self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1 + patches, width), std=std))

# %% wrong="vision_transformer" because="the class token's position starts at zero"
- self.positions = nn.Parameter(std * torch.randn(1 + patches, width))
+ places = std * torch.randn(1 + patches, width)
+ places[0] = 0
+ self.positions = nn.Parameter(places)

# %% wrong="clip_loss" because="'logit_scale: … any floating dtype': its exp is taken in its own half precision, which rounds, and overflows float16"
def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    image, text = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
    z = logit_scale.exp() * (image @ text.T)
    own = torch.arange(len(z), device=z.device)
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def clamp_logit_scale_(logit_scale: Tensor, most: float = 100.0) -> None:
    with torch.no_grad():
        logit_scale.clamp_(max=math.log(most))

# %% wrong="siglip_loss" because="'Finite for logits of any size … gradients as in clip_loss': the value is, but where() lets 0 · inf into the gradients"
def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    negatives_only: bool = False,
) -> Tensor:
    u, v = F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)
    z = wide(logit_scale).exp() * (u @ v.T) + wide(logit_bias)
    y = -torch.ones_like(z)
    if not negatives_only:
        y.fill_diagonal_(1)
    x = y * z
    each = torch.where(x > 0, torch.log1p(torch.exp(-x)), torch.log1p(torch.exp(x)) - x)
    return each.sum() / len(image)

# %% wrong="train_clip" because="'The training mode stays as it is': train() and back by the root's flag, which switches submodules that were frozen in eval mode"
def train_clip(
    model: DualEncoder,
    images: Tensor,
    captions: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    weight_decay: float = 0.1,
) -> list[float]:
    mode = model.training
    model.train()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6)
    losses = []
    for k in range(steps):
        rows = torch.randperm(len(images), generator=generator)[:batch_size].to(images.device)
        model.zero_grad()
        value = loss(
            model.encode_image(images[rows]),
            model.encode_text(captions[rows]),
            model.logit_scale,
            model.logit_bias,
        )
        value.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * k / steps)) / 2
        optimizer.step()
        clamp_logit_scale_(model.logit_scale)
        losses.append(value.item())
    model.zero_grad()
    model.train(mode)
    return losses

# %% wrong="zero_shot" because="'the mean (never zero) of its normalized templates, normalized': 1e-6 added to the length shortens a class whose sentences nearly cancel"
def zero_shot(image: Tensor, prompts: Tensor) -> Tensor:
    image, prompts = wide(image), wide(prompts)
    mean = F.normalize(prompts, dim=-1).mean(1)
    mean = mean / (mean.norm(dim=-1, keepdim=True) + 1e-6)
    return (F.normalize(image, dim=-1) @ mean.T).argmax(1)

# %% wrong="zero_shot" because="1e-6 added to each length halves a template as short as that"
- classes = F.normalize(wide(prompts), dim=-1).mean(1)
+ classes = (wide(prompts) / (wide(prompts).norm(dim=-1, keepdim=True) + 1e-6)).mean(1)

# %% wrong="projector" because="merge: 'ValueError where the number of tokens is not that of the grid': twice as many become twice the batch"
def merge_tokens(tokens: Tensor, grid: tuple[int, int], size: int = 2) -> Tensor:
    rows, columns = grid
    if rows % size or columns % size or tokens.shape[1] % (rows * columns):
        raise ValueError(f"{tokens.shape[1]} tokens, grid {grid}, squares of {size}")
    width = tokens.shape[-1]
    x = tokens.reshape(-1, rows // size, size, columns // size, size, width)
    return x.transpose(2, 3).flatten(3).flatten(1, 2)


def unmerge_tokens(merged: Tensor, grid: tuple[int, int], size: int = 2) -> Tensor:
    rows, columns = grid
    batch, count, numbers = merged.shape
    if rows % size or columns % size or numbers % size**2:
        raise ValueError(f"grid {grid} and width {numbers}: no multiples")
    if count * size**2 != rows * columns:
        raise ValueError(f"{count} squares do not fill {grid}")
    x = merged.reshape(batch, rows // size, columns // size, size, size, numbers // size**2)
    return x.transpose(2, 3).flatten(1, 4)


class Projector(nn.Module):
    def __init__(self, vision_width: int, width: int, grid: tuple[int, int], size: int = 1) -> None:
        super().__init__()
        self.grid, self.size = grid, size
        self.first = nn.Linear(size**2 * vision_width, width)
        self.second = nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(merge_tokens(patches, self.grid, self.size))))

# %% wrong="splice_image_tokens" because="'It is never given the placeholder': placeholders are embedded as id 0, which may be the placeholder itself"
def splice_image_tokens(
    embed: Callable[[Tensor], Tensor],
    rows: Sequence[Tensor],
    labels: Sequence[Tensor],
    images: Sequence[Tensor],
    placeholder: int,
    left: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if sum(int((row == placeholder).sum()) for row in rows) != len(images):
        raise ValueError("there must be as many images as placeholders")
    queue = iter(images)
    spliced, targets = [], []
    for row, aims in zip(rows, labels, strict=True):
        vectors = embed(row.masked_fill(row == placeholder, 0))
        pieces, marks, last = [vectors[:0]], [aims[:0]], 0
        for place in (row == placeholder).nonzero()[:, 0].tolist():
            image = next(queue)
            pieces += [vectors[last:place], image]
            marks += [aims[last:place], aims.new_full((len(image),), IGNORE)]
            last = place + 1
        spliced.append(torch.cat([*pieces, vectors[last:]]))
        targets.append(torch.cat([*marks, aims[last:]]))
    longest = max(len(x) for x in spliced)
    inputs = spliced[0].new_zeros(len(rows), longest, spliced[0].shape[1])
    out = targets[0].new_full((len(rows), longest), IGNORE)
    mask = torch.zeros_like(out, dtype=torch.bool)
    for k, (x, y) in enumerate(zip(spliced, targets, strict=True)):
        where = slice(longest - len(x), longest) if left else slice(0, len(x))
        inputs[k, where], out[k, where], mask[k, where] = x, y, True
    return inputs, out, mask

# %% wrong="apply_mrope" because="'Angles are computed in float32 for half-precision x': positions are rounded to x's dtype first"
def apply_mrope(
    x: Tensor,
    positions: Tensor,
    sections: tuple[int, int, int],
    interleaved: bool = False,
    theta: float = 10_000.0,
) -> Tensor:
    half = x.shape[-1] // 2
    if sum(sections) != half:
        raise ValueError(f"{sections} do not add up to {half}")
    if interleaved:
        axes = [0] * half
        for axis in (1, 2):
            for k in range(sections[axis]):
                if axis + 3 * k >= half:
                    raise ValueError(f"axis {axis} has no {sections[axis]} pairs")
                axes[axis + 3 * k] = axis
    else:
        axes = [0] * sections[0] + [1] * sections[1] + [2] * sections[2]
    m = wide(positions.to(x.dtype))[axes].permute(1, 2, 0)
    y = wide(x)
    speeds = theta ** (-torch.arange(half, device=x.device, dtype=y.dtype) * 2 / x.shape[-1])
    a = (m * speeds)[:, None]
    p, q = y[..., :half], y[..., half:]
    turned = torch.cat([p * a.cos() - q * a.sin(), q * a.cos() + p * a.sin()], dim=-1)
    return turned.to(x.dtype)

# %% wrong="apply_mrope" because="'height has the pairs 1, 4, 7, …, as many as its section says': refuses a last group cut off after its height, as (2, 2, 1)"
def apply_mrope(
    x: Tensor,
    positions: Tensor,
    sections: tuple[int, int, int],
    interleaved: bool = False,
    theta: float = 10_000.0,
) -> Tensor:
    half = x.shape[-1] // 2
    if sum(sections) != half:
        raise ValueError(f"{sections} do not add up to {half}")
    if interleaved:
        if 3 * max(sections[1:]) > half:
            raise ValueError(f"{sections} cannot be interleaved in {half} pairs")
        axes = [0] * half
        axes[1 : 3 * sections[1] : 3] = [1] * sections[1]
        axes[2 : 3 * sections[2] : 3] = [2] * sections[2]
    else:
        axes = [0] * sections[0] + [1] * sections[1] + [2] * sections[2]
    y = wide(x)
    m = positions.to(y.dtype)[axes].permute(1, 2, 0)
    speeds = theta ** (-torch.arange(half, device=x.device, dtype=y.dtype) * 2 / x.shape[-1])
    a = (m * speeds)[:, None]
    p, q = y[..., :half], y[..., half:]
    turned = torch.cat([p * a.cos() - q * a.sin(), q * a.cos() + p * a.sin()], dim=-1)
    return turned.to(x.dtype)
