"""lm-evaluation-harness on a checkpoint: its numbers are ours, on local data, without a network."""

import json
import math
import os
import subprocess
import sys

import pytest
import tiny_checkpoint
import torch

from nightshift.fixed import checkpoint
from nightshift.fixed.config import ROOT

pytest.importorskip("lm_eval", reason="needs the `eval` extra")
pytestmark = pytest.mark.slow  # importing the harness takes seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("harness")
    return tiny_checkpoint.make(work / "run", work)


@pytest.fixture(scope="module")
def lm(folder):
    from nightshift.harness import NightshiftLM

    model, tokenizer, _ = checkpoint.load(folder)
    return NightshiftLM(model, tokenizer)


def ask(lm, kind: str, *arguments):
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type=kind, doc={}, arguments=args, idx=i)
        for i, args in enumerate(arguments)
    ]
    return getattr(lm, kind)(requests, disable_tqdm=True)


def logprobs(lm, tokens: list[int]) -> torch.Tensor:
    """Of each token after the first, by one plain forward pass."""
    with torch.inference_mode():
        logp_TV = torch.log_softmax(lm.model(torch.tensor([tokens[:-1]]))[0], dim=-1)
    return logp_TV.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_a_likelihood_is_the_sum_over_the_continuation(lm):
    context, said = "The night", " sees the model."
    whole = [lm.tokens.bos, *lm.tokens.encode(context + said)]
    start = 1 + len(lm.tokens.encode(context))
    ((score, is_greedy), (empty, _)) = ask(lm, "loglikelihood", (context, said), ("", said))
    assert score == pytest.approx(float(logprobs(lm, whole)[start - 1 :].sum()), abs=1e-4)
    assert not is_greedy
    alone = [lm.tokens.bos, *lm.tokens.encode(said)]
    assert empty == pytest.approx(float(logprobs(lm, alone).sum()), abs=1e-4)


def test_a_greedy_continuation_is_known_as_such(lm):
    (said,) = ask(lm, "generate_until", ("The night", {"max_gen_toks": 5, "until": []}))
    ((_, is_greedy),) = ask(lm, "loglikelihood", ("The night", said))
    ids = lm.tokens.encode("The night" + said)
    if ids[: len(lm.tokens.encode("The night"))] == lm.tokens.encode("The night"):
        assert is_greedy or "\ufffd" in said


def test_generation_ends_before_the_first_stop_text(lm):
    (whole,) = ask(lm, "generate_until", ("The night", {"max_gen_toks": 20, "until": ["@@@"]}))
    stop = whole[4:6]
    (cut,) = ask(lm, "generate_until", ("The night", {"max_gen_toks": 20, "until": [stop]}))
    assert cut == whole[: whole.index(stop)]


def test_a_long_text_is_scored_whole_each_token_once(lm):
    text = "The night sees the model. " * 20
    (score,) = ask(lm, "loglikelihood_rolling", (text,))
    ids = [lm.tokens.bos, *lm.tokens.encode(text)]
    assert len(ids) > 3 * lm.seq_len
    total, size = 0.0, lm.seq_len
    total += float(logprobs(lm, ids[: size + 1]).sum())
    for start in range(size, len(ids) - 1, size):
        end = min(start + size, len(ids) - 1)
        window = ids[end - size : end + 1]  # the last one reaches back: context for its tokens
        total += float(logprobs(lm, window)[-(end - start) :].sum())
    assert score == pytest.approx(total, rel=1e-5)


def test_a_chat_is_asked_in_our_chat_format(folder):
    from nightshift.fixed import conversation
    from nightshift.harness import NightshiftLM

    model, tokenizer, _ = checkpoint.load(folder)
    lm = NightshiftLM(model, tokenizer)
    messages = [{"role": "user", "content": "Two and two?"}]
    assert lm.tok_encode("<|bos|>")[1:] == tokenizer.encode("<|bos|>")
    rendered = lm.apply_chat_template(messages)
    assert lm.tok_encode(rendered) == conversation.prompt(messages, tokenizer)


def test_three_tasks_run_offline_from_the_command_line(folder, tmp_path):
    """All network calls fail: only loopback is left to the process, and nothing listens there."""
    closed = "http://127.0.0.1:9"
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
        "HF_HOME": str(tmp_path),
        "HTTP_PROXY": closed,
        "HTTPS_PROXY": closed,
        "OMP_NUM_THREADS": "1",
    }
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "nightshift.cli", "lm-eval", str(folder)]
    command += ["--limit", "8", "--output", str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())["results"]
    assert 0 <= results["nightshift_sentences"]["acc,none"] <= 1
    assert results["nightshift_repeat"]["exact_match,none"] == 0
    # An untrained model of 300 tokens needs about log2(300) bits a token, more than one a byte.
    assert 2 < results["nightshift_bytes"]["bits_per_byte,none"] < 40
    assert "bits_per_byte" in done.stdout


def test_the_harness_s_bits_per_byte_are_those_of_our_own_sum(folder, lm):
    from nightshift.harness import evaluate
    from nightshift.lm_eval_tasks.data import pieces

    found = evaluate(folder, ["nightshift_bytes"], limit=5)
    texts = pieces(str(folder))["test"]["text"][:5]
    nats = -sum(ask(lm, "loglikelihood_rolling", *[(text,) for text in texts]))
    ours = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert found["results"]["nightshift_bytes"]["bits_per_byte,none"] == pytest.approx(ours)
