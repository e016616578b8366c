"""The closed-loop tasks through lm-evaluation-harness: on a stub that knows what it says, and on a tiny model."""

import json

import pytest
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from lagless.lab.evaluation import ClosedLoop, hf_model, problems, vllm_model
from lagless.lab.evaluation._closed_loop import TASK_FOLDER

SUBJECTS = [
    "biology",
    "chemistry",
    "computer_science",
    "european_history",
    "geography",
    "government_and_politics",
    "macroeconomics",
    "mathematics",
    "microeconomics",
    "physics",
    "psychology",
    "statistics",
    "us_history",
    "world_history",
]  # App. C of the paper


@pytest.fixture
def data(tmp_path):
    """Small files with the columns of the real ones."""
    records = {
        "gsm8k": [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(20)],
        "boolq": [
            {"question": f"is {i} even", "passage": f"About the number {i}.", "answer": i % 2 == 0} for i in range(20)
        ],
        "mmlu_hs": [
            {
                "subject": f"high_school_{subject}",
                "question": f"Pick {i} in {subject}",
                "choices": ["w", "x", "y", "z"],
                "answer": "ABCD"[i % 4],
            }
            for subject in SUBJECTS
            for i in range(5)
        ],
    }
    for task, rows in records.items():
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {task: str(tmp_path / f"{task}.jsonl") for task in records}


class Stub(LM):
    """Answers prompts by a function, which also counts them."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.requests = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        self.requests += requests
        return [self.answer(request.args[0]) for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


def asked(prompt):
    """What the last question in a prompt is about."""
    return prompt.rpartition("Question: ")[2].split("\n")[0]


def test_gsm8k_accuracy_is_per_prompt_then_averaged(data):
    said = iter(range(10**6))

    def half_right(prompt):
        right = int(asked(prompt).split()[2]) + 1
        return f"So it is {right}. The answer is {right}." if next(said) % 2 else "The answer is 999."

    loop = ClosedLoop(["gsm8k"], data, prompts=6, samples=4)
    stub = Stub(half_right)
    score = loop(stub)["gsm8k"]
    assert score.mean.value == 0.5 and score.mean.n == 6 and score.mean.standard_error == 0.0
    assert set(score.prompts.values()) == {0.5} and score.answered == 1.0 and score.truncated is None
    assert len(stub.requests) == 24
    arguments = stub.requests[0].args[1]
    assert arguments["temperature"] == 1.0 and arguments["do_sample"] and arguments["top_k"] == 0
    assert "Think step by step" in stub.requests[0].args[0]


def test_standard_error_is_over_prompts(data):
    def right_on_small_numbers(prompt):
        number = int(asked(prompt).split()[2])
        return f"#### {number + 1 if number < 10 else -1}"

    score = ClosedLoop(["gsm8k"], data, prompts=20, samples=2)(Stub(right_on_small_numbers))["gsm8k"]
    assert score.mean.value == 0.5
    assert score.mean.standard_error == pytest.approx((0.25 / 19) ** 0.5)
    assert score.prompts["gsm8k/3"] == 1.0 and score.prompts["gsm8k/13"] == 0.0
    other = ClosedLoop(["gsm8k"], data, prompts=20, samples=2)(Stub(lambda prompt: "no idea"))["gsm8k"]
    assert other.answered == 0.0
    difference = score.difference(other)
    assert difference.value == 0.5 and difference.n == 20


def test_boolq_shows_five_examples_that_are_not_asked(data):
    stub = Stub(lambda prompt: "Yes." if int(asked(prompt).split()[1]) % 2 == 0 else "The answer is no.")
    score = ClosedLoop(["boolq"], data, prompts=15, samples=2)(stub)["boolq"]
    assert score.mean.value == 1.0
    shown = [line for line in stub.requests[0].args[0].split("\n") if line.startswith("Question: ")]
    assert len(shown) == 6
    own = {asked(request.args[0]) for request in stub.requests}
    assert len(own) == 15 and not own & {line.removeprefix("Question: ") for line in shown[:5]}
    for example in stub.requests[0].args[0].split("\n\n")[:5]:
        number = int(example.split("Question: is ")[1].split()[0])
        assert example.endswith("Answer: yes" if number % 2 == 0 else "Answer: no")


def test_mmlu_is_averaged_over_subjects(data):
    def right_in_physics(prompt):
        _, number, _, subject = asked(prompt).split()
        letter = "ABCD"[int(number) % 4] if subject == "physics" else "none"
        return f"I think (A).\nThe answer is ({letter})."

    stub = Stub(right_in_physics)
    score = ClosedLoop(["mmlu_hs"], data, prompts=3, samples=2)(stub)["mmlu_hs"]
    assert score.mean.value == pytest.approx(1 / 14) and score.mean.n == 3 * 14
    assert score.parts == {subject: float(subject == "physics") for subject in SUBJECTS}
    assert [asked(request.args[0]).split()[3] for request in stub.requests] == [s for s in SUBJECTS for _ in range(6)]
    asks = Stub(lambda prompt: "The answer is (B).")
    score = ClosedLoop(["mmlu_hs"], data, prompts=4, samples=1)(asks)["mmlu_hs"]
    assert score.mean.value == pytest.approx(sum(score.parts.values()) / 14)
    assert "(A) w\n(B) x\n(C) y\n(D) z" in asks.requests[0].args[0]


def test_arithmetic_asks_the_test_split(data):
    solved = {}
    source = problems("test", seed=3, level=2)
    for _ in range(50):
        problem = next(source)
        solved[problem.question] = problem.answer
    loop = ClosedLoop(["arithmetic"], prompts=8, samples=2, seed=3, level=2)
    assert loop(Stub(lambda prompt: solved[asked(prompt)]))["arithmetic"].mean.value == 1.0


@pytest.mark.parametrize("task", ["gsm8k", "boolq", "mmlu_hs", "arithmetic"])
def test_a_tiny_model_is_evaluated_repeatably(task, data, model, tokenizer):
    given = {task: data[task]} if task in data else None
    loop = ClosedLoop([task], given, prompts=2, samples=3, max_new_tokens=4)
    first, again = (loop(hf_model(model, tokenizer))[task] for _ in range(2))
    assert first == again
    assert len(first.prompts) == 2 * (14 if task == "mmlu_hs" else 1)
    assert first.truncated == 0 and 0.0 <= first.mean.value <= 1.0


def test_prompts_that_are_cut_are_counted(data, model, tokenizer):
    long = ClosedLoop(["boolq"], {"boolq": data["boolq"]}, prompts=2, samples=1, max_new_tokens=900)
    assert long(hf_model(model, tokenizer))["boolq"].truncated == 2


def test_the_chat_template_is_used(data, model, tokenizer):
    loop = ClosedLoop(["gsm8k"], data, prompts=1, samples=1, max_new_tokens=2, chat=True)
    wrapped = hf_model(model, tokenizer)
    seen = []
    generate = wrapped.generate_until
    wrapped.generate_until = lambda requests: seen.extend(requests) or generate(requests)
    loop(wrapped)
    assert seen[0].args[0].startswith("<user>Question:") and seen[0].args[0].endswith("<assistant>")
    with pytest.raises(ValueError, match="no chat template"):
        loop(Stub(lambda prompt: ""))


def test_prompts_are_fixed_by_the_seed(data):
    def prompts(seed):
        return list(ClosedLoop(["gsm8k"], data, prompts=5, samples=1, seed=seed)(Stub(lambda p: ""))["gsm8k"].prompts)

    assert prompts(0) == prompts(0) != prompts(1)


def test_the_harness_finds_the_tasks_by_itself(data, model, tokenizer):
    """As ``lm_eval --include_path FOLDER --tasks lagless_gsm8k --metadata ... --limit 2`` does."""
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data": data["gsm8k"]})
    assert {"lagless_gsm8k", "lagless_boolq", "lagless_mmlu_hs", "lagless_arithmetic"} <= set(manager.all_tasks)
    manager = TaskManager(
        include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data": data["gsm8k"], "prompts": 10}
    )
    found = simple_evaluate(
        hf_model(model, tokenizer),
        tasks=["lagless_gsm8k"],
        task_manager=manager,
        limit=2,
        gen_kwargs={"max_gen_toks": 2},
        bootstrap_iters=0,
    )
    assert found["n-samples"]["lagless_gsm8k"]["effective"] == 2
    assert len(found["samples"]["lagless_gsm8k"][0]["resps"][0]) == 50


def test_bad_requests_are_refused_before_anything_runs(data, tmp_path):
    with pytest.raises(ValueError, match="task 'gsm' is unknown; there are boolq, gsm8k, mmlu_hs, arithmetic"):
        ClosedLoop(["gsm"])
    with pytest.raises(ValueError, match="samples=0"):
        ClosedLoop(["arithmetic"], samples=0)
    with pytest.raises(ValueError, match="prompts=16: the data has 20 rows, 5 of which are examples"):
        ClosedLoop(["boolq"], data, prompts=16)
    with pytest.raises(ValueError, match="has no column passage; it has question, answer"):
        ClosedLoop(["boolq"], {"boolq": data["gsm8k"]}, prompts=2)
    (tmp_path / "odd.jsonl").write_text('{"question": "q", "answer": "five"}\n')
    with pytest.raises(ValueError, match="does not end in '#### N'"):
        ClosedLoop(["gsm8k"], {"gsm8k": str(tmp_path / "odd.jsonl")}, prompts=1)
    with pytest.raises(ValueError, match="has only about"):
        ClosedLoop(["arithmetic"], prompts=1000)
    with pytest.raises(ImportError, match=r"pip install .lagless\[vllm\]"):
        vllm_model("folder")
