"""EleutherAI's lm-evaluation-harness on one of our checkpoints, so that numbers compare.

    nightshift lm-eval champion                                   our three small tasks, offline
    nightshift lm-eval first/4 --tasks hellaswag,arc_easy         the harness's own (from the hub)
    nightshift lm-eval sft/latest --chat --tasks ifeval --limit 50

Our tasks (lm_eval_tasks/): nightshift_sentences (multiple choice by likelihood), nightshift_bytes
(bits per byte, by the harness's sums) and nightshift_repeat (generated), made from the dev split of
the checkpoint's corpus. Any YAML of yours: --include-path.

Likelihoods are computed in float32. A context that does not fit in the model's window loses its
beginning, as in the harness's own models. Needs the `eval` extra: pip install 'nightshift[eval]'.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from nightshift import catalogue
from nightshift.fixed import conversation
from nightshift.fixed.config import ConfigError
from nightshift.fixed.result import write_json
from nightshift.fixed.tokenizer import SPECIAL_TOKENS, Tokenizer
from nightshift.generate import Engine, Sampling

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    sys.exit(
        "nightshift lm-eval: the harness is not installed. Run: pip install 'nightshift[eval]'"
    )

TASKS = Path(__file__).with_name("lm_eval_tasks")
OURS = ("nightshift_sentences", "nightshift_bytes", "nightshift_repeat")
BATCH_SIZE = 16
MAX_NEW_TOKENS = 128  # for a task that does not say
SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")

Scored = tuple[float, bool]  # log likelihood in nats; would greedy decoding have said it?


class NightshiftLM(TemplateLM):
    """What the harness asks of a model: likelihoods of texts, and continuations."""

    def __init__(self, model, tokenizer: Tokenizer, name: str = "nightshift"):
        super().__init__()
        self.engine = Engine(model, tokenizer)
        self.model, self.tokens, self.name = self.engine.model, tokenizer, name
        self.seq_len = model.config.seq_len
        self.is_chat = False

    @property
    def eot_token_id(self) -> int:
        return self.tokens.bos

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **others
    ) -> list[int]:
        """With <|bos|> in front, unless told otherwise. Rendered chats hold special tokens."""
        ids = self._encode_chat(string) if self.is_chat else self.tokens.encode(string)
        has_bos = bool(ids) and ids[0] == self.tokens.bos
        return ids if add_special_tokens is False or has_bos else [self.tokens.bos, *ids]

    def _encode_chat(self, string: str) -> list[int]:
        ids = []
        for part in filter(None, SPECIAL.split(string)):
            special = self.tokens.special.get(part)
            ids += self.tokens.encode(part) if special is None else [special]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of our chat format. From now on text that looks special is special."""
        self.is_chat = True
        conversation.check(chat_history)
        said = [f"<|{m['role']}_start|>{m['content']}<|{m['role']}_end|>" for m in chat_history]
        end = "<|assistant_start|>" if add_generation_prompt else ""
        return "<|bos|>" + "".join(said) + end

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "nightshift" if chat_template else ""

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **others) -> list[Scored]:
        """`requests`: ((context, continuation), their tokens, its tokens)."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found: dict[int, Scored] = {}
        for part in _parts(order, BATCH_SIZE):
            found |= dict(zip(part, self._score([pairs[i] for i in part]), strict=True))
        return [found[i] for i in range(len(pairs))]

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
        device = next(self.model.parameters()).device
        windows = [[*context, *said][-self.seq_len - 1 :] for context, said in pairs]
        tokens_BT = torch.zeros(len(pairs), max(map(len, windows)) - 1, dtype=torch.long)
        for row, window in enumerate(windows):
            tokens_BT[row, : len(window) - 1] = torch.tensor(window[:-1])
        logits_BTV = self.model(tokens_BT.to(device)).float().cpu()
        return [
            _scored(logits_TV[: len(window) - 1], window, len(said))
            for logits_TV, window, (_, said) in zip(logits_BTV, windows, pairs, strict=True)
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Each token once, with as much before it as the window holds."""
        return [self._whole_text(request.args[0]) for request in requests]

    def _whole_text(self, text: str) -> float:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.seq_len,
            context_len=1,
        )
        pairs = [((text, text), *make_disjoint_window(window)) for window in windows]
        return sum(score for score, _ in self._loglikelihood_tokens(pairs))

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        prompts, samplings = [], []
        for request in requests:
            context, wanted = request.args
            prompts.append(self.tok_encode(context))
            samplings.append(_sampling(wanted))
        said: list[str] = []
        for part in _parts(range(len(prompts)), BATCH_SIZE):
            completions = self.engine.generate(
                [prompts[i] for i in part], [samplings[i] for i in part]
            )
            said += [completion.text for completion in completions]
        return said


def _parts(items: Iterable[int], size: int) -> Iterator[list[int]]:
    items = list(items)
    return (items[i : i + size] for i in range(0, len(items), size))


def _scored(logits_TV: torch.Tensor, window: list[int], num_said: int) -> Scored:
    num_said = min(num_said, len(window) - 1)
    logp_TV = torch.log_softmax(logits_TV[-num_said:], dim=-1)
    said = torch.tensor(window[-num_said:])
    is_greedy = bool((logp_TV.argmax(-1) == said).all())
    return float(logp_TV.gather(-1, said[:, None]).double().sum()), is_greedy


def _sampling(wanted: dict) -> Sampling:
    until = wanted.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(filter(None, until))
    is_random = wanted.get("do_sample") and wanted.get("temperature", 1.0) > 0
    temperature = wanted.get("temperature", 1.0) if is_random else 0.0
    max_tokens = wanted.get("max_gen_toks", MAX_NEW_TOKENS)
    return Sampling(max_tokens=max_tokens, temperature=temperature, stop=stop, seed=0)


def evaluate(
    folder: Path,
    tasks: Sequence[str] = OURS,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    include_path: str | None = None,
    device: str = "cpu",
) -> dict:
    """The harness's results: {"results": {task: {metric: value}}, ...}."""
    model, tokenizer, _ = catalogue.load(folder, device)
    found = simple_evaluate(
        model=NightshiftLM(model, tokenizer, str(folder)),
        tasks=list(tasks),
        task_manager=_tasks(tasks, include_path, folder),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        bootstrap_iters=1000,
        log_samples=False,
    )
    return {key: found[key] for key in ("results", "versions", "n-samples")}


def _tasks(tasks: Sequence[str], include_path: str | None, folder: Path) -> TaskManager:
    """Our folder and yours; the harness's own 10,000 tasks only if one of them is wanted."""
    places = [str(TASKS), *([include_path] if include_path else [])]
    manager = TaskManager(
        include_path=places, include_defaults=False, metadata={"folder": str(folder)}
    )
    if set(tasks) <= set(manager.all_tasks):
        return manager
    return TaskManager(include_path=places, metadata={"folder": str(folder)})


def table(results: dict[str, dict]) -> str:
    """task, metric, value, standard error: a line each."""
    lines = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, _, filter_ = key.partition(",")
            if isinstance(value, float) and not name.endswith("_stderr"):
                error = metrics.get(f"{name}_stderr,{filter_}")
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task:<24} {name:<16} {value:.4f}{spread}")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="nightshift lm-eval", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="champion, first/4, pretrain/<run> or a folder")
    parser.add_argument("--tasks", default=",".join(OURS), help="with commas (%(default)s)")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--chat", action="store_true", help="ask in the chat format")
    parser.add_argument("--include-path", help="a folder of your own task files")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    args = parser.parse_args(arguments)
    tasks = args.tasks.split(",")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if all(task.startswith("nightshift_") for task in tasks):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing to ask for there
    try:
        found = evaluate(
            catalogue.find(args.checkpoint).folder,
            tasks,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            chat=args.chat,
            include_path=args.include_path,
            device=args.device,
        )
    except (ConfigError, ValueError, KeyError) as error:
        print(error, file=sys.stderr)
        return 2
    if args.output:
        write_json(args.output, found)
    print(table(found["results"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
