# Right and wrong answers to the exercises of lesson 34: see CONTRIBUTING.md.

# %% wrong="latency" because="tpot divides by the number of tokens"
- return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
+ return (times[-1] - times[0]) / len(times) if len(times) > 1 else 0.0

# %% wrong="latency" because="tpot of one token divides by zero"
- return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
+ return (times[-1] - times[0]) / (len(times) - 1)

# %% wrong="latency" because="ttft is the moment of the first token"
- return times[0] - arrival if times else math.inf
+ return times[0] if times else math.inf

# %% wrong="latency" because="a request without a token has waited for no time"
- return times[0] - arrival if times else math.inf
+ return times[0] - arrival if times else 0.0

# %% wrong="latency" because="percentile interpolates"
- rank = -(-q * len(values) // 100)  # whole numbers throughout: a float would miss exact ranks
- return sorted(values)[max(rank, 1) - 1]
+ return float(torch.tensor(values, dtype=torch.float64).quantile(q / 100))

# %% wrong="latency" because="the rank is computed in floats: 7 percent of 100 is more than 7"
- rank = -(-q * len(values) // 100)  # whole numbers throughout: a float would miss exact ranks
+ rank = math.ceil(q / 100 * len(values))

# %% wrong="latency" because="the rank is rounded down"
- rank = -(-q * len(values) // 100)  # whole numbers throughout: a float would miss exact ranks
+ rank = q * len(values) // 100

# %% wrong="latency" because="percentile 0 takes the last value"
- return sorted(values)[max(rank, 1) - 1]
+ return sorted(values)[rank - 1]

# %% wrong="latency" because="percentile sorts in place"
- return sorted(values)[max(rank, 1) - 1]
+ values.sort()
+ return values[max(rank, 1) - 1]

# %% wrong="latency" because="goodput asks for one of the limits"
- came and ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit
+ came and (ttft(arrival, came) <= ttft_limit or tpot(came) <= tpot_limit)

# %% wrong="latency" because="a limit that is met exactly is missed"
- came and ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit
+ came and ttft(arrival, came) < ttft_limit and tpot(came) < tpot_limit

# %% wrong="latency" because="goodput counts who got no token where there is no limit"
- came and ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit
+ ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit

# %% wrong="latency" because="goodput is the share of requests"
- return sum(map(bool, good)) / duration
+ return sum(map(bool, good)) / max(len(good), 1)

# %% wrong="latency" because="a duration of 0 is taken"
- if duration <= 0:
+ if duration < 0:

# %% wrong="latency" because="a first token after no time is taken for none"
- came and ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit
+ came and 0 < ttft(arrival, came) <= ttft_limit and tpot(came) <= tpot_limit

# %% right="latency" because="NumPy's percentile, and a loop"
import numpy as np


def ttft(arrival, times):
    return math.inf if len(times) == 0 else times[0] - arrival


def tpot(times):
    gaps = [later - earlier for earlier, later in zip(times, times[1:])]
    return math.fsum(gaps) / len(gaps) if gaps else 0.0


def percentile(values, q):
    if len(values) == 0:
        raise ValueError("no values")
    for value in sorted(values):
        if 100 * sum(v <= value for v in values) >= q * len(values):
            return value


def goodput(arrivals, times, ttft_limit, tpot_limit, duration):
    if not duration > 0:
        raise ValueError("no time")
    good = 0
    for arrival, came in zip(arrivals, times):
        if came:
            good += int(came[0] - arrival <= ttft_limit and tpot(came) <= tpot_limit)
    return good / duration

# %% wrong="chunked_prefill" because="in order of age, decodes or not"
- for i in decodes + prompts:
+ for i in range(len(pending)):

# %% wrong="chunked_prefill" because="prompts first"
- for i in decodes + prompts:
+ for i in prompts + decodes:

# %% wrong="chunked_prefill" because="a prompt that does not fit whole waits"
- counts[i] = min(pending[i], budget)
+ counts[i] = pending[i] if pending[i] <= budget else 0

# %% wrong="chunked_prefill" because="decodes get their token beyond the budget"
- budget -= counts[i]
+ budget = max(budget - counts[i], 1 if pending[i] == 1 else 0)

# %% wrong="chunked_prefill" because="the shortest prompt first"
- prompts = [i for i, tokens in enumerate(pending) if tokens > 1]
+ prompts = sorted((i for i, tokens in enumerate(pending) if tokens > 1), key=pending.__getitem__)

# %% wrong="chunked_prefill" because="the prompts share the rest equally"
- counts[i] = min(pending[i], budget)
- budget -= counts[i]
+ counts[i] = min(pending[i], budget if pending[i] == 1 else max(1, budget // len(prompts)))
+ budget -= counts[i]

# %% wrong="chunked_prefill" because="counts down in the list that it was given"
- counts[i] = min(pending[i], budget)
- budget -= counts[i]
+ counts[i] = min(pending[i], budget)
+ pending[i] -= counts[i]
+ budget -= counts[i]

# %% right="chunked_prefill" because="by a sorted order and cumulative sums"
from itertools import accumulate


def chunked_prefill(pending, budget):
    order = sorted(range(len(pending)), key=lambda i: (pending[i] != 1, i))
    before = [0, *accumulate(pending[i] for i in order)]
    counts = {i: max(0, min(pending[i], budget - b)) for i, b in zip(order, before)}
    return [counts[i] for i in range(len(pending))]

# %% wrong="scheduler" because="the oldest is preempted"
- youngest = self.running.pop()
+ youngest = self.running.pop(0)

# %% wrong="scheduler" because="the preempted go to the end of the queue"
- self.waiting.appendleft(youngest)
+ self.waiting.append(youngest)

# %% wrong="scheduler" because="whoever needs a block is preempted, the oldest too"
- youngest = self.running.pop()
+ self.running.remove(sequence)
+ youngest = sequence

# %% wrong="scheduler" because="a sequence that lacks a block just waits for a step"
- while not self.blocks.grow(sequence, tokens):
+ while False:

# %% wrong="scheduler" because="all younger sequences are preempted at once"
- youngest = self.running.pop()
- self.blocks.release(youngest)
- self.waiting.appendleft(youngest)
- self.preemptions += 1
+ while True:
+     youngest = self.running.pop()
+     self.blocks.release(youngest)
+     self.waiting.appendleft(youngest)
+     self.preemptions += 1
+     if youngest is sequence or self.running[-1] is sequence:
+         break

# %% wrong="scheduler" because="the preempted lose what they wrote"
- self.blocks.release(youngest)
+ self.blocks.release(youngest)
+ youngest.tokens = youngest.tokens[: youngest.prompt]

# %% wrong="scheduler" because="the preempted keep their blocks"
- self.blocks.release(youngest)
+ youngest.computed = 0

# %% wrong="scheduler" because="preemptions are not counted"
- self.preemptions += 1
+ pass

# %% wrong="scheduler" because="later ones overtake the first that does not fit"
- if len(self.running) == self.max_running or not self.blocks.admit(self.waiting[0]):
-     break
- sequence = self.waiting.popleft()
+ fits = [s for s in self.waiting if -(-len(s.tokens) // self.blocks.size) <= self.blocks.available]
+ if len(self.running) == self.max_running or not fits or not self.blocks.admit(fits[0]):
+     break
+ sequence = fits[0]
+ self.waiting.remove(sequence)

# %% wrong="scheduler" because="admits one sequence a step"
- while self.waiting and left:
+ for _ in [0] * bool(self.waiting and left):

# %% wrong="scheduler" because="one more than max_running"
- if len(self.running) == self.max_running or not self.blocks.admit(self.waiting[0]):
+ if len(self.running) > self.max_running or not self.blocks.admit(self.waiting[0]):

# %% wrong="scheduler" because="a prompt is admitted only if the budget takes it whole"
- if len(self.running) == self.max_running or not self.blocks.admit(self.waiting[0]):
+ if (
+     len(self.running) == self.max_running
+     or (self.running and self.waiting[0].pending > left)
+     or not self.blocks.admit(self.waiting[0])
+ ):

# %% wrong="scheduler" because="an admitted prompt passes whole, beyond the budget"
- plan.append((sequence, min(sequence.pending, left)))
+ plan.append((sequence, sequence.pending))

# %% wrong="scheduler" because="the budget of the running ones is not subtracted"
- left = self.budget - sum(count for _, count in plan)
+ left = self.budget

# %% wrong="scheduler" because="static: admits only when nobody runs"
- while self.waiting and left:
+ while self.waiting and left and not pending:

# %% wrong="scheduler" because="a sequence that was preempted by an older one is planned"
- if sequence not in self.running:  # preempted, as are all that follow
-     break
+ if False:
+     break

# %% wrong="scheduler" because="moves computed on by itself"
- plan.append((sequence, count))
+ plan.append((sequence, count))
+ sequence.computed += count

# %% wrong="scheduler" because="finish keeps the blocks"
- self.running.remove(sequence)
- self.blocks.release(sequence)
+ self.running.remove(sequence)

# %% wrong="scheduler" because="finish knows only running sequences"
- if sequence in self.running:
-     self.running.remove(sequence)
-     self.blocks.release(sequence)
- else:
-     self.waiting.remove(sequence)
+ self.running.remove(sequence)
+ self.blocks.release(sequence)

# %% wrong="scheduler" because="nothing is refused at the door"
- if longest > room:
+ if False:

# %% wrong="scheduler" because="the door forgets the answer"
- if longest > room:
+ if len(sequence.tokens) > room:

# %% wrong="scheduler" because="the door refuses what fits exactly"
- if longest > room:
+ if longest >= room:

# %% wrong="scheduler" because="a budget below max_running is taken"
- if not 1 <= max_running <= budget:
+ if not 1 <= max_running:

# %% wrong="scheduler" because="no place to run is taken"
- if not 1 <= max_running <= budget:
+ if not 0 <= max_running <= budget:

# %% right="scheduler" because="lists, one loop over ages, and the budget kept by hand"
class Scheduler:
    def __init__(self, blocks, budget, max_running):
        if max_running < 1 or budget < max_running:
            raise ValueError("each running sequence needs a token")
        self.blocks = blocks
        self.budget = budget
        self.max_running = max_running
        self.preemptions = 0
        self.waiting = []
        self.running = []

    def add(self, sequence):
        if len(sequence.tokens) + sequence.max_new > self.blocks.count * self.blocks.size:
            raise ValueError("can never fit")
        self.waiting.append(sequence)

    def finish(self, sequence):
        self.blocks.release(sequence)
        for line in (self.waiting, self.running):
            line[:] = [other for other in line if other is not sequence]

    def step(self):
        spare = self.budget
        wanted = {}
        for wants_one in (True, False):
            for sequence in self.running:
                missing = len(sequence.tokens) - sequence.computed
                if (missing == 1) == wants_one:
                    wanted[sequence.id] = min(missing, spare)
                    spare -= wanted[sequence.id]
        preempted = []
        plan = []
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            count = wanted[sequence.id]
            if count == 0 or self.blocks.grow(sequence, sequence.computed + count):
                if count:
                    plan.append((sequence, count))
                place += 1
            else:
                victim = self.running.pop(-1)
                self.blocks.release(victim)
                preempted.insert(0, victim)
        self.preemptions += len(preempted)
        self.waiting = preempted + self.waiting
        spare = self.budget - sum(count for _, count in plan)
        if preempted:
            return plan
        while self.waiting and spare > 0 and len(self.running) < self.max_running:
            if not self.blocks.admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            self.running.append(sequence)
            count = min(spare, len(sequence.tokens) - sequence.computed)
            plan.append((sequence, count))
            spare -= count
        return plan

# %% wrong="scheduler" because="what admit found computed takes budget again"
- plan.append((sequence, min(sequence.pending, left)))
+ plan.append((sequence, min(len(sequence.tokens), left)))

# %% wrong="engine" because="a token is chosen in the middle of a prompt"
- if sequence.pending:
-     continue
- token, reason = sequence.choose(row), None
+ token, reason = sequence.choose(row), None

# %% wrong="engine" because="each piece begins at the beginning of the text"
- [(s.tokens[s.computed : s.computed + n], s.computed, s.table) for s, n in plan]
+ [(s.tokens[:n], s.computed, s.table) for s, n in plan]

# %% wrong="engine" because="each piece is placed at position 0"
- [(s.tokens[s.computed : s.computed + n], s.computed, s.table) for s, n in plan]
+ [(s.tokens[s.computed : s.computed + n], 0, s.table) for s, n in plan]

# %% wrong="engine" because="the whole rest of a prompt passes, whatever the plan says"
- [(s.tokens[s.computed : s.computed + n], s.computed, s.table) for s, n in plan]
+ [(s.tokens[s.computed :], s.computed, s.table) for s, n in plan]

# %% wrong="engine" because="the whole text passes in each step"
- [(s.tokens[s.computed : s.computed + n], s.computed, s.table) for s, n in plan]
+ [(s.tokens[: s.computed + n], 0, s.table) for s, n in plan]

# %% wrong="engine" because="computed is not moved on"
- sequence.computed += count
- if sequence.pending:
-     continue
+ if len(sequence.tokens) > sequence.computed + count:
+     continue

# %% wrong="engine" because="every request is greedy"
- token, reason = sequence.choose(row), None
+ token, reason = greedy(row), None

# %% wrong="engine" because="the prompt is kept, not copied"
- sequence = Sequence(self.given, prompt, max_new, stop, choose)
+ sequence = Sequence(self.given, prompt, max_new, stop, choose)
+ sequence.tokens = prompt

# %% wrong="engine" because="max_new counts the prompt"
- elif len(sequence.tokens) - sequence.prompt == sequence.max_new:
+ elif len(sequence.tokens) >= sequence.max_new:

# %% wrong="engine" because="one token too many"
- elif len(sequence.tokens) - sequence.prompt == sequence.max_new:
+ elif len(sequence.tokens) - sequence.prompt > sequence.max_new:

# %% wrong="engine" because="length comes before stop"
- if token == sequence.stop:
-     reason = "stop"
- elif len(sequence.tokens) - sequence.prompt == sequence.max_new:
-     reason = "length"
+ if len(sequence.tokens) - sequence.prompt == sequence.max_new:
+     reason = "length"
+ elif token == sequence.stop:
+     reason = "stop"

# %% wrong="engine" because="the stop token is not part of the answer"
- events.append((sequence.id, token, reason))
+ if reason != "stop":
+     events.append((sequence.id, token, reason))

# %% wrong="engine" because="the stop token is ignored"
- if token == sequence.stop:
+ if False:

# %% wrong="engine" because="finished requests are released a step later"
-     if reason:
-         self.cancel(sequence.id)
- return events
+ for id in getattr(self, "old", []):
+     self.cancel(id)
+ self.old = [id for id, _, reason in events if reason]
+ return events

# %% wrong="engine" because="a cancelled request keeps its blocks"
- self.scheduler.finish(self.requests.pop(id))
+ self.scheduler.running = [s for s in self.scheduler.running if s.id != id]
+ self.scheduler.waiting = deque(s for s in self.scheduler.waiting if s.id != id)
+ del self.requests[id]

# %% wrong="engine" because="an unknown id is an error"
- if id in self.requests:
-     self.scheduler.finish(self.requests.pop(id))
+ self.scheduler.finish(self.requests.pop(id))

# %% wrong="engine" because="an empty prompt is taken"
- if not prompt or max_new < 1:
+ if max_new < 1:

# %% wrong="engine" because="no new tokens are taken"
- if not prompt or max_new < 1:
+ if not prompt:

# %% wrong="engine" because="a refused request leaves a trace"
- self.scheduler.add(sequence)
- self.requests[self.given] = sequence
+ self.requests[self.given] = sequence
+ self.scheduler.add(sequence)

# %% wrong="engine" because="ids are the number of living requests"
- self.requests[self.given] = sequence
- self.given += 1
+ self.requests[self.given] = sequence
+ self.given = len(self.requests)

# %% wrong="engine" because="busy only while something runs"
- return bool(self.requests)
+ return bool(self.scheduler.running)

# %% wrong="engine" because="the model is run for nobody"
- if not plan:
-     return []
+ if not plan:
+     self.runner([([0], 0, [0])])
+     return []

# %% wrong="engine" because="the logits' maximum is emitted before choose, which is called twice"
- token, reason = sequence.choose(row), None
+ sequence.choose(row)
+ token, reason = sequence.choose(row), None

# %% wrong="engine" because="the stop token 0 is taken for none"
- if token == sequence.stop:
+ if sequence.stop and token == sequence.stop:

# %% wrong="engine" because="token 0 ends every answer"
- if token == sequence.stop:
+ if token == (sequence.stop or 0):

# %% wrong="engine" because="the request 0 cannot be cancelled"
- if id in self.requests:
+ if id and id in self.requests:

# %% right="engine" because="reasons by a helper, finishing after the loop"
class Engine:
    def __init__(self, model, scheduler):
        self.scheduler = scheduler
        self.runner = Runner(model, scheduler.blocks.count, scheduler.blocks.size)
        self.alive = []
        self.next_id = 1000

    @property
    def limit(self):
        return self.scheduler.blocks.count * self.scheduler.blocks.size

    @property
    def busy(self):
        return len(self.alive) > 0

    def submit(self, prompt, max_new=16, stop=None, choose=greedy):
        if len(prompt) == 0 or max_new <= 0 or len(prompt) + max_new > self.limit:
            raise ValueError("cannot be served")
        self.next_id += 1
        request = Sequence(self.next_id, list(prompt), max_new, stop, choose)
        self.alive.append(request)
        self.scheduler.add(request)
        return self.next_id

    def cancel(self, id):
        for request in [r for r in self.alive if r.id == id]:
            self.alive.remove(request)
            self.scheduler.finish(request)

    def step(self):
        plan = self.scheduler.step()
        pieces = []
        for request, count in plan:
            end = request.computed + count
            pieces.append((request.tokens[request.computed : end], request.computed, request.table))
        events = []
        if pieces:
            logits = self.runner(pieces)
            for n, (request, count) in enumerate(plan):
                request.computed = request.computed + count
                if request.computed < len(request.tokens):
                    continue
                request.tokens = request.tokens + [request.choose(logits[n])]
                written = request.tokens[request.prompt :]
                reason = {True: "length", False: None}[len(written) == request.max_new]
                if written[-1] == request.stop:
                    reason = "stop"
                events.append((request.id, written[-1], reason))
        for id, _, reason in events:
            if reason is not None:
                self.cancel(id)
        return events

# %% wrong="endpoint" because="each token is decoded alone"
- if text := decoder.decode(piece, final=reason is not None):
+ if text := piece.decode("utf-8", "replace"):

# %% wrong="endpoint" because="what is unfinished at the end is dropped"
- if text := decoder.decode(piece, final=reason is not None):
+ if text := decoder.decode(piece):

# %% wrong="endpoint" because="bytes that are no UTF-8 are dropped"
- decoder = codecs.getincrementaldecoder("utf-8")("replace")
+ decoder = codecs.getincrementaldecoder("utf-8")("ignore")

# %% wrong="endpoint" because="bytes that are no UTF-8 raise"
- decoder = codecs.getincrementaldecoder("utf-8")("replace")
+ decoder = codecs.getincrementaldecoder("utf-8")()

# %% wrong="endpoint" because="empty pieces are sent"
- if text := decoder.decode(piece, final=reason is not None):
-     yield event({"content": text})
+ yield event({"content": decoder.decode(piece, final=reason is not None)})

# %% wrong="endpoint" because="the stop token's text is sent"
- piece = b"" if token == texts.stop else texts.bytes[token]
+ piece = texts.bytes[token]

# %% wrong="endpoint" because="no first chunk with the role"
- yield event({"role": "assistant", "content": ""})
+ pass

# %% wrong="endpoint" because="the reason comes with the last piece of text"
- yield event({}, reason)
- yield "data: [DONE]\n\n"
+ yield "data: [DONE]\n\n"

# %% wrong="endpoint" because="no [DONE]"
- yield "data: [DONE]\n\n"
+ pass

# %% wrong="endpoint" because="one line feed between events"
- return f"data: {json.dumps(chunk)}\n\n"
+ return f"data: {json.dumps(chunk)}\n"

# %% wrong="endpoint" because="events without data:"
- return f"data: {json.dumps(chunk)}\n\n"
+ return f"{json.dumps(chunk)}\n\n"

# %% wrong="endpoint" because="Python's repr for JSON"
- return f"data: {json.dumps(chunk)}\n\n"
+ return f"data: {chunk}\n\n"

# %% wrong="endpoint" because="text is sent when all of it is there"
- if text := decoder.decode(piece, final=reason is not None):
-     yield event({"content": text})
+ written = locals().get("written", "") + decoder.decode(piece, final=reason is not None)
+ if reason is not None:
+     yield event({"content": written})

# %% wrong="endpoint" because="a request is closed only at its good end"
- try:
-     yield event({"role": "assistant", "content": ""})
+ if True:
+     yield event({"role": "assistant", "content": ""})

-     yield "data: [DONE]\n\n"
- finally:
-     bridge.close(id)
+     yield "data: [DONE]\n\n"
+     bridge.close(id)

# %% wrong="endpoint" because="closed on errors, not when the client is gone"
-     yield "data: [DONE]\n\n"
- finally:
-     bridge.close(id)
+     yield "data: [DONE]\n\n"
+     bridge.close(id)
+ except Exception:
+     bridge.close(id)
+     raise

# %% wrong="endpoint" because="an error in the engine ends the stream as if well"
-     yield "data: [DONE]\n\n"
- finally:
-     bridge.close(id)
+     yield "data: [DONE]\n\n"
+ except RuntimeError:
+     yield event({}, "stop")
+     yield "data: [DONE]\n\n"
+ finally:
+     bridge.close(id)

# %% wrong="endpoint" because="FastAPI's own 422"
- @app.exception_handler(RequestValidationError)
+ @app.exception_handler(KeyError)

# %% wrong="endpoint" because="validation is a 500"
- return error_response(400, f"{field or 'the body'}: {first['msg']}", field)
+ return error_response(500, f"{field or 'the body'}: {first['msg']}", field)

# %% wrong="endpoint" because="the param begins with body"
- place = [str(part) for part in first["loc"][1:]]  # the first says that it is the body
+ place = [str(part) for part in first["loc"]]

# %% wrong="endpoint" because="the param is the last part of the place"
- place = [str(part) for part in first["loc"][1:]]  # the first says that it is the body
+ place = [str(part) for part in first["loc"][-1:]]

# %% wrong="endpoint" because="the place in broken JSON is called a field"
- field = None if first["type"] == "json_invalid" else ".".join(place) or None
+ field = ".".join(place) or None

# %% wrong="endpoint" because="the message does not say what is wrong"
- return error_response(400, f"{field or 'the body'}: {first['msg']}", field)
+ return error_response(400, f"bad request: {field}", field)

# %% wrong="endpoint" because="any model's name is served"
- if body.model != model:
+ if False:

# %% wrong="endpoint" because="an unknown model is a 400 without a code"
- return error_response(404, message, "model", "model_not_found")
+ return error_response(400, message, "model")

# %% wrong="endpoint" because="too long a prompt is left to the engine"
- if len(prompt) + body.max_tokens > engine.limit:
+ if False:

# %% wrong="endpoint" because="the limit counts the prompt alone"
- if len(prompt) + body.max_tokens > engine.limit:
+ if len(prompt) > engine.limit:

# %% wrong="endpoint" because="exactly the limit is refused"
- if len(prompt) + body.max_tokens > engine.limit:
+ if len(prompt) + body.max_tokens >= engine.limit:

# %% wrong="endpoint" because="the limit is not told"
- f"{engine.limit} tokens that fit"
+ "tokens that fit"

# %% wrong="endpoint" because="temperature and seed are ignored"
- choose = sampler(body.temperature, body.seed)
+ choose = greedy

# %% wrong="endpoint" because="the seed is ignored"
- choose = sampler(body.temperature, body.seed)
+ choose = sampler(body.temperature)

# %% wrong="endpoint" because="the engine is not told the stop token"
- options = {"max_new": body.max_tokens, "stop": texts.stop, "choose": choose}
+ options = {"max_new": body.max_tokens, "choose": choose}

# %% wrong="endpoint" because="max_tokens is ignored"
- options = {"max_new": body.max_tokens, "stop": texts.stop, "choose": choose}
+ options = {"stop": texts.stop, "choose": choose}

# %% wrong="endpoint" because="always a stream"
- if body.stream:
+ if True:

# %% wrong="endpoint" because="a stream of type text/plain"
- return StreamingResponse(events, media_type="text/event-stream")
+ return StreamingResponse(events, media_type="text/plain")

# %% wrong="endpoint" because="an answer in one piece is never closed"
-         pieces.append(b"" if token == texts.stop else texts.bytes[token])
- finally:
-     bridge.close(id)
+         pieces.append(b"" if token == texts.stop else texts.bytes[token])
+ finally:
+     pass

# %% wrong="endpoint" because="usage without the stop token"
- "completion_tokens": written,
+ "completion_tokens": written - (reason == "stop"),

# %% wrong="endpoint" because="a finish_reason that is always stop"
- "message": {"role": "assistant", "content": text},
- "finish_reason": reason,
+ "message": {"role": "assistant", "content": text},
+ "finish_reason": "stop",

# %% wrong="endpoint" because="the ids of chunks count up"
- "id": f"chatcmpl-{id}",
- "object": "chat.completion.chunk",
+ "id": f"chatcmpl-{time.monotonic_ns()}",
+ "object": "chat.completion.chunk",

# %% wrong="endpoint" because="created is a float"
- created = int(time.time())
+ created = time.time()

# %% wrong="endpoint" because="each chunk asks the clock anew"
- "created": created,
+ "created": int(time.time()),

# %% wrong="endpoint" because="closed on errors and when it is cancelled, not where it stands at a yield"
-     yield "data: [DONE]\n\n"
- finally:
-     bridge.close(id)
+     yield "data: [DONE]\n\n"
+ except (Exception, asyncio.CancelledError):
+     bridge.close(id)
+     raise
+ bridge.close(id)

# %% wrong="endpoint" because="the request 0 is never closed"
-     yield "data: [DONE]\n\n"
- finally:
-     bridge.close(id)
+     yield "data: [DONE]\n\n"
+ finally:
+     if id:
+         bridge.close(id)

# %% wrong="endpoint" because="the stop token 0 is taken for none"
- piece = b"" if token == texts.stop else texts.bytes[token]
+ piece = b"" if texts.stop and token == texts.stop else texts.bytes[token]

# %% wrong="endpoint" because="the seed 0 is taken for none"
- choose = sampler(body.temperature, body.seed)
+ choose = sampler(body.temperature, body.seed or None)

# %% wrong="endpoint" because="the request is submitted before anybody asks for an event"
-     decoder = codecs.getincrementaldecoder("utf-8")("replace")
-     id = bridge.open(prompt, **options)
+     return stream_opened(bridge, texts, model, bridge.open(prompt, **options))
+ async def stream_opened(bridge, texts, model, id):
+     decoder = codecs.getincrementaldecoder("utf-8")("replace")

- async def stream_chat(
+ def stream_chat(

# %% right="endpoint" because="text held back by hand, and one generator for both kinds of answer"
def longest_whole(raw: bytes) -> int:
    """How many of the bytes can be decoded for good."""
    for n in range(1, min(4, len(raw) + 1)):
        lead = raw[-n]
        if lead >= 0xC0:
            want = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            try:
                raw[-n:].decode()
            except UnicodeDecodeError as error:
                unfinished = error.reason == "unexpected end of data"
                return len(raw) - n if n < want and unfinished else len(raw)
            return len(raw)
        if lead < 0x80:
            return len(raw)
    return len(raw)


async def pieces_of(bridge, texts, id):
    raw = b""
    while True:
        token, reason = await bridge.next(id)
        if token != texts.stop:
            raw += texts.bytes[token]
        cut = len(raw) if reason else longest_whole(raw)
        yield raw[:cut].decode("utf-8", errors="replace"), reason
        raw = raw[cut:]
        if reason:
            return


async def stream_chat(bridge, texts, model, prompt, options):
    id = None
    try:
        id = bridge.open(prompt, **options)
        base = {"id": "chatcmpl-" + str(id), "object": "chat.completion.chunk"}
        base |= {"created": round(time.time()), "model": model}

        def line(delta, reason=None):
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return "data: " + json.dumps({**base, "choices": [choice]}, ensure_ascii=False) + "\n\n"

        yield line({"role": "assistant", "content": ""})
        async for text, reason in pieces_of(bridge, texts, id):
            if text:
                yield line({"content": text})
        yield line({}, reason)
        yield "data: [DONE]\n\n"
    finally:
        if id is not None:
            bridge.close(id)


def make_app(engine, texts, model):
    bridge = Bridge(engine)
    app = FastAPI(lifespan=bridge.lifespan)

    async def refused(request, error):
        detail = error.errors()[0]
        where = None
        if detail["type"] != "json_invalid" and len(detail["loc"]) > 1:
            where = ".".join(map(str, detail["loc"][1:]))
        return error_response(400, f"{detail['msg']} ({where or 'request body'})", where)

    app.add_exception_handler(RequestValidationError, refused)

    @app.post("/v1/chat/completions")
    async def complete(request: ChatRequest):
        if request.model != model:
            text = f"this server has {model}, not {request.model}"
            return error_response(404, text, param="model", code="model_not_found")
        ids = texts.prompt(request.messages)
        if engine.limit < len(ids) + request.max_tokens:
            text = f"at most {engine.limit} tokens fit"
            return error_response(400, text, "messages", "context_length_exceeded")
        choose = sampler(request.temperature, seed=request.seed)
        options = dict(max_new=request.max_tokens, stop=texts.stop, choose=choose)
        if request.stream:
            return StreamingResponse(
                stream_chat(bridge, texts, model, ids, options), media_type="text/event-stream"
            )
        counted = []
        inner = options.pop("choose")

        def counting(logits):
            return inner(logits)

        id = bridge.open(ids, choose=counting, **options)
        answer, reason = [], None
        try:
            while not reason:
                token, reason = await bridge.next(id)
                counted.append(token)
                answer.append(texts.bytes[token] if token != texts.stop else b"")
        finally:
            bridge.close(id)
        content = b"".join(answer).decode(errors="replace")
        message = {"role": "assistant", "content": content}
        return JSONResponse(
            {
                "id": f"chatcmpl-{id}",
                "object": "chat.completion",
                "created": int(time.time()),
                "model": model,
                "choices": [{"index": 0, "message": message, "finish_reason": reason}],
                "usage": {
                    "prompt_tokens": len(ids),
                    "completion_tokens": len(counted),
                    "total_tokens": len(ids) + len(counted),
                },
            }
        )

    return app

# %% wrong="radix_cache" because="match stops at the end of an edge that agrees only in part"
- node, done = self.split(child, n), done + n
- node.used = self.clock
+ if n < len(child.keys):
+     break
+ node, done = child, done + n
+ node.used = self.clock

# %% wrong="radix_cache" because="an edge that agrees in part is taken whole"
- node, done = self.split(child, n), done + n
+ node, done = child, done + n

# %% wrong="radix_cache" because="the split loses the old node's children"
- upper.children[node.keys[0]] = node
+ upper.children[node.keys[0]] = self.Node(node.keys, node.values, upper, node.used)

# %% wrong="radix_cache" because="insert replaces the values that were held"
- node, done = self.walk(keys)
- if done < len(keys):
+ node, done = self.walk(keys)
+ at, end = node, done
+ while at is not self.root:
+     at.values = list(values[end - len(at.values) : end])
+     end, at = end - len(at.values), at.parent
+ if done < len(keys):

# %% wrong="radix_cache" because="insert keeps the caller's lists"
- list(keys[done:]), list(values[done:]), node, self.clock
+ keys if not done else list(keys[done:]), values if not done else list(values[done:]), node, self.clock

# %% wrong="radix_cache" because="insert does not look at the lengths"
- if len(keys) != len(values):
+ if False:

# %% wrong="radix_cache" because="insert gives how many are new"
- return done
+ return len(keys) - done

# %% wrong="radix_cache" because="one key on each edge"
- if done < len(keys):
-     node.children[keys[done]] = self.Node(
-         list(keys[done:]), list(values[done:]), node, self.clock
-     )
+ for i in range(done, len(keys)):
+     node.children[keys[i]] = self.Node([keys[i]], [values[i]], node, self.clock)
+     node = node.children[keys[i]]

# %% wrong="radix_cache" because="match is no use"
-     node.used = self.clock
- return node, done
+ return node, done

# %% wrong="radix_cache" because="the whole edge is used, though the walk ended within it"
- upper = self.Node(node.keys[:n], node.values[:n], node.parent, node.used)
+ node.used = self.clock
+ upper = self.Node(node.keys[:n], node.values[:n], node.parent, node.used)

# %% wrong="radix_cache" because="the most recently used goes first"
- node = min(ends, key=lambda n: n.used)
+ node = max(ends, key=lambda n: n.used)

# %% wrong="radix_cache" because="whole leaves are evicted"
- evicted.append(node.values.pop())
- last = node.keys.pop()
+ evicted += node.values[::-1]
+ last = node.keys[0]
+ node.keys, node.values = [], []

# %% wrong="radix_cache" because="the beginning of an edge is evicted"
- evicted.append(node.values.pop())
- last = node.keys.pop()
+ evicted.append(node.values.pop(0))
+ last = node.keys.pop()

# %% wrong="radix_cache" because="what is in use goes too"
- ends = [n for n in self.nodes() if not n.children and n.values[-1] not in used]
+ ends = [n for n in self.nodes() if not n.children]

# %% wrong="radix_cache" because="inner nodes are evicted"
- ends = [n for n in self.nodes() if not n.children and n.values[-1] not in used]
+ ends = [n for n in self.nodes() if n.values[-1] not in used]

# %% wrong="radix_cache" because="an empty node stays in the tree"
- if not node.keys:  # the last key that went was its first
-     del node.parent.children[last]
+ if not node.keys:
+     break

# %% wrong="radix_cache" because="one value at most"
- while len(evicted) < count:
+ for _ in [0] * bool(count):

# %% wrong="radix_cache" because="a leaf any of whose values is in use stays whole"
- ends = [n for n in self.nodes() if not n.children and n.values[-1] not in used]
+ ends = [n for n in self.nodes() if not n.children and not set(n.values) & set(used)]

# %% wrong="radix_cache" because="only the end of a path is used"
-     node.used = self.clock
- return node, done
+ node.used = self.clock
+ return node, done

# %% wrong="radix_cache" because="insert uses what it adds, and the end of what it found"
- node, done = self.walk(keys)
- if done < len(keys):
+ before = {id(n): n.used for n in self.nodes()}
+ node, done = self.walk(keys)
+ above = node.parent
+ while above is not None:
+     above.used = before.get(id(above), above.used)
+     above = above.parent
+ if done < len(keys):

# %% right="radix_cache" because="times and values in tuples, recursion, edges cut when they are drawn"
class RadixCache:
    def __init__(self):
        self.tree = {}  # key → [keys, values, times, subtree]
        self.now = 0

    def _find(self, keys):
        """The path: (subtree that holds the edge, edge, how many of its keys agree)."""
        self.now += 1
        tree, done, path = self.tree, 0, []
        while done < len(keys) and keys[done] in tree:
            edge = tree[keys[done]]
            agree = 0
            for mine, theirs in zip(edge[0], keys[done:]):
                if mine != theirs:
                    break
                agree += 1
            edge[2][:agree] = [self.now] * agree
            path.append((tree, edge, agree))
            done += agree
            if agree < len(edge[0]):
                break
            tree = edge[3]
        return path, done

    def match(self, keys):
        path, _ = self._find(keys)
        return [value for _, edge, agree in path for value in edge[1][:agree]]

    def insert(self, keys, values):
        keys, values = list(keys), list(values)
        if len(keys) != len(values):
            raise ValueError("keys and values differ in number")
        path, done = self._find(keys)
        if done == len(keys):
            return done
        tree = self.tree
        if path:
            _, edge, agree = path[-1]
            if agree < len(edge[0]):
                lower = [part[agree:] for part in edge[:3]] + [edge[3]]
                edge[0], edge[1], edge[2] = (part[:agree] for part in edge[:3])
                edge[3] = {lower[0][0]: lower}
            tree = edge[3]
        rest = keys[done:]
        tree[rest[0]] = [rest, values[done:], [self.now] * len(rest), {}]
        return done

    def _all(self, tree):
        for edge in tree.values():
            yield tree, edge
            yield from self._all(edge[3])

    def evict(self, count, used=frozenset()):
        gone = []
        for _ in range(count):
            best = None
            for tree, edge in self._all(self.tree):
                free = not edge[3] and edge[1][-1] not in used
                if free and (best is None or edge[2][-1] < best[1][2][-1]):
                    best = tree, edge
            if best is None:
                break
            tree, edge = best
            key = edge[0].pop()
            gone.append(edge[1].pop())
            edge[2].pop()
            if not edge[0]:
                tree.pop(key)
        return gone

    def __len__(self):
        return sum(len(edge[1]) for _, edge in self._all(self.tree))

    def edges(self):
        return [len(edge[0]) for _, edge in self._all(self.tree)]

# %% wrong="constrained" because="only the first byte of a token is looked at"
- for byte in text:
+ for byte in text[:1]:

# %% wrong="constrained" because="a token without bytes is allowed"
- state = start if text else -1
+ state = start

# %% wrong="constrained" because="stop is allowed everywhere"
- after[start, stop] = start if start in accepting else -1
+ after[start, stop] = start

# %% wrong="constrained" because="stop's bytes count, too"
- after[start, stop] = start if start in accepting else -1
+ if start in accepting:
+     after[start, stop] = start

# %% wrong="constrained" because="after counts where a token is not allowed"
- return after >= 0, after
+ return after >= 0, after.clamp(min=0)

# %% wrong="constrained" because="masks as numbers"
- return after >= 0, after
+ return (after >= 0).long(), after

# %% wrong="constrained" because="after in int32"
- after = torch.full((len(automaton), len(vocabulary)), -1)
+ after = torch.full((len(automaton), len(vocabulary)), -1, dtype=torch.int32)

# %% wrong="constrained" because="only whole texts are read: a token may not end in the middle"
- after[start, token] = state
+ after[start, token] = state if state in accepting or len(text) == 1 else -1

# %% wrong="constrained" because="a large negative number for minus infinity"
- token = self.choose(torch.where(allowed, logits, -math.inf))
+ token = self.choose(torch.where(allowed, logits, -1e9))

# %% wrong="constrained" because="logits are multiplied by the mask"
- token = self.choose(torch.where(allowed, logits, -math.inf))
+ token = self.choose(logits * allowed)

# %% wrong="constrained" because="the logits are masked in place"
- token = self.choose(torch.where(allowed, logits, -math.inf))
+ token = self.choose(logits.masked_fill_(~allowed, -math.inf))

# %% wrong="constrained" because="masked logits are float32"
- token = self.choose(torch.where(allowed, logits, -math.inf))
+ token = self.choose(torch.where(allowed, logits.float(), -math.inf))

# %% wrong="constrained" because="always greedy"
- token = self.choose(torch.where(allowed, logits, -math.inf))
+ token = greedy(torch.where(allowed, logits, -math.inf))

# %% wrong="constrained" because="the state is not moved on"
- self.state = int(self.after[self.state, token])
+ pass

# %% wrong="constrained" because="a state that allows nothing is not noticed"
- if not allowed.any():
+ if False:

# %% wrong="constrained" because="one state for all texts"
- self.allowed, self.after, self.choose, self.state = allowed, after, choose, 0
+ self.allowed, self.after, self.choose = allowed, after, choose
+ Constrained.state = getattr(Constrained, "state", 0)

- self.state = int(self.after[self.state, token])
+ Constrained.state = int(self.after[self.state, token])

# %% wrong="constrained" because="a byte that leads back to state 0 leads nowhere"
- state = automaton[state].get(byte, -1)
- if state < 0:
-     break
+ state = automaton[state].get(byte) or -1
+ if state < 0:
+     break

# %% wrong="constrained" because="state 0 is never the end"
- after[start, stop] = start if start in accepting else -1
+ after[start, stop] = start if start and start in accepting else -1

# %% wrong="constrained" because="stays where a token leads back to state 0"
- self.state = int(self.after[self.state, token])
+ self.state = int(self.after[self.state, token]) or self.state

# %% right="constrained" because="all states at once, token by token"
def token_masks(automaton, accepting, vocabulary, stop):
    count = len(automaton)
    move = torch.full((count + 1, 256), count)  # the state `count` is nowhere
    for state, edges in enumerate(automaton):
        for byte, following in edges.items():
            move[state, byte] = following
    columns = []
    for token, text in enumerate(vocabulary):
        at = torch.arange(count) if text else torch.full((count,), count)
        for byte in text:
            at = move[at, byte]
        if token == stop:
            at = torch.tensor([s if s in accepting else count for s in range(count)])
        columns.append(at)
    after = torch.stack(columns, dim=1)
    after = after.masked_fill(after == count, -1)
    return after != -1, after


class Constrained:
    def __init__(self, allowed, after, choose=greedy):
        self.forbidden, self.after, self.choose = ~allowed, after, choose
        self.state = torch.tensor(0)

    def __call__(self, logits):
        forbidden = self.forbidden[self.state]
        if bool(forbidden.all()):
            raise ValueError("a dead end")
        masked = logits.clone()
        masked[forbidden] = float("-inf")
        token = self.choose(masked)
        self.state = self.after[self.state, token]
        return token

# %% wrong="disaggregated" because="prefills begin at the arrival, whoever is at work"
- free = max(free, arrival) + prefill_time(prompts[i])
+ free = arrival + prefill_time(prompts[i])

# %% wrong="disaggregated" because="the prefill worker does not wait for arrivals"
- free = max(free, arrival) + prefill_time(prompts[i])
+ free = free + prefill_time(prompts[i])

# %% wrong="disaggregated" because="no transfer"
- heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
+ heapq.heappush(ready, (free, i))

# %% wrong="disaggregated" because="the transfer holds the prefill worker"
- if outputs[i] > 1:
-     heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
+ if outputs[i] > 1:
+     free += transfer_time(prompts[i])
+     heapq.heappush(ready, (free, i))

# %% wrong="disaggregated" because="ready in the order of prefill"
- heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
+ arrives = free + transfer_time(prompts[i])
+ ready.append((max(arrives, ready[-1][0] if ready else 0.0), i))

# %% wrong="disaggregated" because="whoever gets ready during a step is in it"
- clock += step_time(len(running))
+ clock += step_time(len(running))
+ while ready and ready[0][0] <= clock:
+     running.append(heapq.heappop(ready)[1])

# %% wrong="disaggregated" because="ready at the moment of the step is too late"
- while ready and ready[0][0] <= clock:
+ while ready and (ready[0][0] < clock or not running):

# %% wrong="disaggregated" because="a batch is over before the next one begins"
- while ready and ready[0][0] <= clock:
+ while ready and ready[0][0] <= clock and not times[0][99:] and (not running or fresh):

- if not running:
-     clock = max(clock, ready[0][0])
+ fresh = not running
+ if not running:
+     clock = max(clock, ready[0][0])

# %% wrong="disaggregated" because="a step costs the same for any batch"
- clock += step_time(len(running))
+ clock += step_time(1)

# %% wrong="disaggregated" because="each request writes a token too many"
- running = [i for i in running if len(times[i]) < outputs[i]]
+ running = [i for i in running if len(times[i]) <= outputs[i]]

# %% wrong="disaggregated" because="a request of one token is decoded, too"
- if outputs[i] > 1:
-     heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
+ heapq.heappush(ready, (free + transfer_time(prompts[i]), i))

# %% wrong="disaggregated" because="the first token comes out of the decode worker"
- times.append([free])
- if outputs[i] > 1:
-     heapq.heappush(ready, (free + transfer_time(prompts[i]), i))
+ times.append([])
+ heapq.heappush(ready, (free + transfer_time(prompts[i]), i))

# %% right="disaggregated" because="sorted by readiness, one decode step after another"
def disaggregated(arrivals, prompts, outputs, prefill_time, transfer_time, step_time):
    ends, end = [], 0.0
    for arrival, prompt in zip(arrivals, prompts):
        end = (end if end > arrival else arrival) + prefill_time(prompt)
        ends.append(end)
    came = [[end] for end in ends]
    at = [end + transfer_time(prompt) for end, prompt in zip(ends, prompts)]
    left = [count - 1 for count in outputs]
    now = 0.0
    while any(left):
        batch = [i for i in range(len(at)) if left[i] and at[i] <= now]
        if not batch:
            now = min(at[i] for i in range(len(at)) if left[i])
            continue
        now = now + step_time(len(batch))
        for i in batch:
            came[i].append(now)
            left[i] -= 1
    return came

# %% wrong="questions" because="the used share, keys without values, no decodes, and so on"
- "idle": 1 - (10 + 20 + 30 + 100) / 400,
- "memory": int(40e9 // (2 * 80 * 8 * 128 * 2 * 2000)),
- "chunks": math.ceil(4096 / (512 - 112)),
- "resumed": 300 + 120,
- "queue": 0.2 + 4 * 0.2**2 / (2 * (1 - 4 * 0.2)),
- "distorted": 0.9 * 0.1 / (0.9 * 0.1 + 0.1),
+ "idle": 0.4,
+ "memory": 122,
+ "chunks": 8,
+ "resumed": 120,
+ "queue": 0.4,
+ "distorted": 0.09,

# %% wrong="questions" because="fractions where whole numbers are asked for"
- "memory": int(40e9 // (2 * 80 * 8 * 128 * 2 * 2000)),
- "chunks": math.ceil(4096 / (512 - 112)),
+ "memory": 40e9 / (2 * 80 * 8 * 128 * 2 * 2000),
+ "chunks": 4096 / (512 - 112),

# %% wrong="questions" because="memoryless prefills, and the mask's probability"
- "queue": 0.2 + 4 * 0.2**2 / (2 * (1 - 4 * 0.2)),
- "distorted": 0.9 * 0.1 / (0.9 * 0.1 + 0.1),
+ "queue": 0.2 / (1 - 4 * 0.2),
+ "distorted": 0.9,

# %% right="questions" because="counted out"
def questions():
    per_block = 80 * 2 * 8 * 128 * 2 * 16
    blocks = -(-2000 // 16)
    return {
        "idle": 0.6,
        "memory": int(40e9 / per_block) // blocks,
        "chunks": 11,
        "resumed": 420,
        "queue": 0.6,
        "distorted": 9 / 19,
    }
