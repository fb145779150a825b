"""dev/bench.py: its baselines compute what the project computes, and its table says what was measured and what was not.

python -m pytest tests/test_bench.py -q

Nothing here depends on how long anything takes: where times matter, the clock is a list.
"""

import copy
import itertools
import json
import re
import sys

import pytest
import torch
from test_distributed import needs_deepspeed

import icu
import metrics
from dev import bench
from kit import data
from kit.flags import run_cli

TEXTS = [
    (
        "The parcel for Ines Duarte was left ",
        "at 14 Harbour Lane on Tuesday morning by the driver.",
    ),
    (
        "Call the clinic at 555-0142 and ask ",
        "for the report of the night nurse, who wrote it down.",
    ),
    (
        "A neighbour saw the van near the old ",
        "mill on Tuesday morning, and nothing was missing there.",
    ),
    (
        "Payments are due on the first day of ",
        "each month; the account number ends in 7731, she said.",
    ),
    (
        "The driver asked the nurse for a van, ",
        "and the neighbour said that it was left near the mill.",
    ),
]
ISSUE = {  # the rows of the issue's table, by words that a reader would look for
    "el": "MA + EL10 of", "bound": "EL10 after", "epoch": "a whole epoch", "step": "a training step (forget",
    "trainer": "icu.py's loop", "zero": "ZeRO-2", "generation": "beam 2",
    "knn": "cosine_knn", "memory": "peak memory of training", "linear": "as samples are forgotten",
    "start": "start to first step", "audit": "evals/audit.py", "tasks": "evals/tasks.py", "gpu": "on a GPU",
    "fits": "cards that a run needs",
}  # fmt: skip


@pytest.fixture
def folder(save_tiny, tmp_path, monkeypatch):
    """A folder with model/, a tiny GPT-Neo, and pairs.jsonl; threads stay as the tests have set them."""
    monkeypatch.setattr(bench, "set_threads", lambda threads: None)
    save_tiny("gpt_neo", tmp_path / "model")
    pairs = [
        {"id": str(i), "context": "", "prefix": prefix, "suffix": suffix, "learn_id": f"n{i}", "learn_context": "",
         "learn_prefix": suffix, "learn_suffix": " " + prefix, "similarity": 0.5}
        for i, (prefix, suffix) in enumerate(TEXTS)
    ]  # fmt: skip
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    return tmp_path


@pytest.fixture
def setup(folder):
    """A Bench of that folder, the model in float64, so that the two ways to compute a value agree closely."""
    argv = ["--quick", "--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl")]
    made = bench.prepare(bench.parse_args([*argv, "--out", str(folder / "out.md")]))
    return made._replace(model=made.model.double())


def run(folder, *flags):
    """main() on the folder; the cells of each line of the table it writes."""
    out = folder / "dev/BENCHMARKS.md"
    bench.main(["--quick", "--model", str(folder / "model"), "--pairs", str(folder / "pairs.jsonl"),
                "--threads", "1", "--repeats", "1", "--out", str(out), *flags])  # fmt: skip
    text = out.read_text(encoding="utf-8")
    return text, [
        line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")
    ][2:]


# --- the baselines ---


@pytest.mark.parametrize("kind", ["gpt_neo", "opt", "llama"])
def test_literal_el_and_ma_are_the_projects(tiny_models, kind):
    """Eq. 7-9 by `generate` equal metrics.el_and_ma, for texts of different lengths, one of them too short for EL."""
    texts = [torch.randint(4, 97, (length,)).tolist() for length in (24, 13, 18, 24, 8)]
    model, n, first = tiny_models[kind], 3, 2
    texts[3][4:] = metrics.beam_generate(model, [texts[3][:4]], [20], num_beams=1)[
        0
    ]  # one that it knows
    ours = bench.our_el_and_ma(model, texts, n=n, start=first)
    literal = bench.literal_el_and_ma(model, texts, n=n, start=first, batch_size=3)
    for mine, theirs in zip(ours, literal, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-6, nan_ok=True)
    assert ours[0][3] > 0.5


def test_the_baseline_epoch_trains_the_same_weights(setup):
    """A forgotten row that keeps its slot and a live frozen copy change no gradient: packed or not, the same step."""
    samples, active = bench.samples_of(setup), [0, 2]
    args = icu.parse_args(bench.flags_of(setup, "--batch-size", "8", "--lr", "1e-3"))
    ours, theirs = copy.deepcopy(setup.model), copy.deepcopy(setup.model)
    bench.trainer(ours, samples, args)(active, 1)
    bench.plain_epoch(theirs, samples, set(active), args)
    for a, b, before in zip(
        ours.parameters(), theirs.parameters(), setup.model.parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)
        assert not torch.equal(a, before)


def test_the_baseline_measure_is_the_projects(setup, encoder_dir):
    """The literal metrics of an epoch are those of icu.measure, name by name."""
    samples, args = bench.samples_of(setup)[:2], icu.parse_args(bench.flags_of(setup))
    theirs = bench.plain_measure(setup.model, setup.tokenizer, samples, args)
    for mine, other in zip(
        icu.measure(setup.model, setup.tokenizer, samples, args), theirs, strict=True
    ):
        assert {name: mine[name] for name in other} == pytest.approx(other, abs=1e-5)


def test_the_baseline_generation_is_the_projects(setup):
    """In batches of equal length, transformers' own beam search says the tokens of metrics.beam_generate."""
    prompts, lengths = bench.prompts_of(bench.samples_of(setup))
    one_by_one = bench.plain_beams(
        setup.model, prompts, lengths, [[i] for i in range(len(prompts))]
    )
    assert one_by_one == metrics.beam_generate(setup.model, prompts, lengths, num_beams=2)
    batches = bench.by_length(prompts, lengths, 2)
    assert sorted(sum(batches, [])) == list(range(len(prompts)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)


def test_the_floor_of_a_step_has_the_same_targets(setup):
    """The plain cross-entropy is that of Eq. 3 on both sides."""
    samples, expected = bench.samples_of(setup), 0
    for side in ("forget", "learn"):
        ids, attention_mask, targets = icu.collate([getattr(sample, side) for sample in samples])
        logits = setup.model(input_ids=ids, attention_mask=attention_mask).logits
        expected = expected + icu.learn_loss(logits, ids, targets)
    assert bench.plain_cross_entropy(setup.model, samples).item() == pytest.approx(
        expected.item(), abs=1e-10
    )


def test_training_without_kl_is_icu_with_beta_0(setup):
    """The method that memory is compared with leaves out the KL and nothing else."""
    samples, losses = bench.samples_of(setup), []
    for flags in (["--method", "graddiff"], ["--method", "icu", "--beta", "0"]):
        model = copy.deepcopy(setup.model)
        args = icu.parse_args(bench.flags_of(setup, *flags, "--alpha", "0.5", "--batch-size", "2"))
        losses.append(bench.trainer(model, samples, args)(range(len(samples)), 1))
    without, with_kl = losses
    assert set(with_kl) - set(without) == {"loss_kl"}
    assert without == pytest.approx({name: with_kl[name] for name in without}, abs=1e-6)


def test_values_that_differ_are_measured_again_in_float64(setup):
    """A difference that float64 does not confirm is a near-tie; a real one is said and is not the same."""
    texts = [sample.forget.ids for sample in bench.samples_of(setup)]
    ours = bench.our_el_and_ma(setup.model, texts)
    assert bench.compare_values(setup.model, texts, ours, ours)[0]
    other = ([value + (i == 1) * 0.1 for i, value in enumerate(ours[0])], ours[1])
    same, said = bench.compare_values(copy.deepcopy(setup.model).float(), texts, ours, other)
    assert same and said.startswith(f"1 of {len(texts)} texts differ by up to 1.0e-01 in float32")
    assert not bench.compare_values(setup.model, texts, ours, other)[0]


def test_transformers_trainer_takes_the_same_steps(setup):
    """Its loss, written as the paper writes it, and its loop give icu.py's losses and weights, KL and Adam included."""
    pytest.importorskip("accelerate")
    batch, args = bench.samples_of(setup)[:3], icu.parse_args(bench.flags_of(setup, "--lr", "1e-3"))
    ours, theirs = copy.deepcopy(setup.model), copy.deepcopy(setup.model)
    run, times = bench.huggingface_steps(theirs, batch, args, 3)
    assert run() == pytest.approx(
        bench.steps_of(bench.trainer(ours, batch, args), batch, 3)(), abs=1e-6
    )
    for a, b, before in zip(
        ours.parameters(), theirs.parameters(), setup.model.parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-6)
        assert not torch.equal(a, before)
    assert len(times) == 1 and times[0] > 0


@pytest.mark.parametrize("kind", ["gpt_neo", "llama"])
def test_what_must_be_decoded_is_what_a_literal_count_says(tiny_models, kind):
    """Of each prefix's `generate`: the tokens behind its first miss and the next, while an n-gram can be repeated."""
    model, n, first, expected = tiny_models[kind], 4, 2, {}
    texts = torch.randint(4, 97, (6, 20)).tolist()
    for text in texts[
        :3
    ]:  # the model knows these but for two tokens: hits, misses and stretches that come again
        said = metrics.beam_generate(model, [text[:3]], [17], num_beams=1)[0]
        text[3:] = (said + text[3:])[:17]
        text[9], text[14] = 5, 6
    eos = bench.models.eos_ids(model)
    for i, text in enumerate(texts):
        for t in range(first, len(text) - n + 1):
            x = torch.tensor([text[:t]])
            said = bench.models.plain_generate(
                model, x, torch.ones_like(x), max_new_tokens=len(text) - t
            )[0, t:]
            said, rest = said.tolist(), text[t:]
            k = next((k for k, token in enumerate(said) if token != rest[k]), None)
            if k is None:
                continue
            grams = {tuple(rest[p : p + j]) for j in range(n + 1) for p in range(len(rest) - j + 1)}

            def goes_on(so_far, said=said, grams=grams, rest=rest):
                left = len(rest) - len(so_far)
                tails = any(
                    tuple(so_far[len(so_far) - j :]) in grams and n - j <= left for j in range(n)
                )
                known = any(tuple(so_far[p : p + n]) in grams for p in range(len(so_far) - n + 1))
                return left > 0 and so_far[-1] not in eos and (tails or known)

            fed = next(d for d in itertools.count() if not goes_on(said[: k + 1 + d]))
            expected[i, t + k] = max(fed, expected.get((i, t + k), 0))
    found = bench.must_be_decoded(model, texts, n=n, start=first)
    assert sorted(found) == sorted((t, fed) for (_, t), fed in expected.items() if fed)
    assert 0 < len(found) < sum(len(text) - n + 1 - first for text in texts)


# --- measuring ---


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds a call, ...): side_by_side's functions seem to take these, one after the other."""

    def set_clock(*durations):
        ticks = itertools.accumulate(itertools.chain([0], *([took, 0] for took in durations)))
        monkeypatch.setattr(bench, "clock_of", lambda device: lambda: next(ticks))

    return set_clock


def test_ratios_are_those_of_the_times_and_who_is_first_changes(clock):
    """Three repeats: theirs / ours is 4, 6 and 5, its median and ends are in the line, whatever the direction."""
    clock(1, 4, 12, 2, 3, 15)
    order = []
    timed = bench.side_by_side(
        lambda: order.append("ours"), lambda: order.append("theirs"), 3, warm_up=False
    )
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (timed.ours, timed.theirs) == ([1, 2, 3], [4, 12, 15])
    line = bench.timed_line("x", timed, bench.Goal(">=", 5), work="w")
    assert line.measured == "5x (4-6)" and line.met and line.work == "w; ours 2 s, theirs 12 s"
    assert (
        bench.timed_line("x", timed, bench.Goal("<=", 0.2), work="").measured == "0.2x (0.167-0.25)"
    )


def test_one_cpu_thread_is_timed_by_its_own_clock(monkeypatch):
    """Sleeping, as while another program has the processor, is not counted; it is with more threads and on a GPU."""
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 1)
    assert bench.seconds(lambda: bench.time.sleep(0.2))[0] < 0.1
    assert bench.seconds(lambda: bench.time.sleep(0.2), clock=bench.time.perf_counter)[0] >= 0.2
    assert bench.clock_of("cuda") is bench.time.perf_counter
    monkeypatch.setattr(bench.torch, "get_num_threads", lambda: 2)
    assert bench.seconds(lambda: bench.time.sleep(0.2))[0] >= 0.2


def test_a_whole_process_is_timed_by_the_wall_clock(setup, monkeypatch):
    """The row of the start waits for children, whose time this process's own clock does not count."""
    monkeypatch.setattr(bench, "run_python", lambda *_: bench.time.sleep(0.2))
    (line,) = bench.start_up(setup)
    assert float(line.work.split("ours ")[1].split(" s")[0]) >= 0.2


def test_a_goal_is_met_by_the_median_and_by_equal_values_only():
    """Both directions, the noise, other values, and no goal at all."""
    at_least, at_most = bench.Goal(">=", 2), bench.Goal("<=", 1, noise=0.02)
    assert bench.ratio_line("", [1, 2, 9], at_least, work="").met is True
    assert bench.ratio_line("", [1, 1.9, 9], at_least, work="").met is False
    assert bench.ratio_line("", [1.02], at_most, work="").met is True
    assert bench.ratio_line("", [1.03], at_most, work="").met is False
    assert bench.ratio_line("", [9], at_least, work="", same=False).met is False
    assert bench.ratio_line("", [9], None, work="").met is None


def test_tokens_through_the_model_are_counted(setup):
    """The shape of every forward pass, padding included, and the function's result as it is."""
    ids = torch.zeros((2, 7), dtype=torch.long)
    watched = bench.watching(
        setup.model, lambda: [setup.model(input_ids=ids) for _ in range(3)] and 5
    )
    assert watched() == (5, [(2, 7)] * 3)


def test_the_gpu_row_has_the_published_sizes(setup):
    """The parameters of EleutherAI's three models, 6 FLOPs a weight and token, and samples that train."""
    for name, parameters in {
        "125M": 125_198_592,
        "1.3B": 1_315_575_808,
        "2.7B": 2_651_307_520,
    }.items():
        with torch.device("meta"):
            model = bench.random_gpt_neo(name)
        assert model.num_parameters() == parameters
        assert bench.step_flops(model, 1, 100) == pytest.approx(6 * parameters, rel=0.02)
    samples = bench.random_samples(2, 20, vocab=320)
    losses = bench.trainer(setup.model, samples, icu.parse_args(bench.flags_of(setup)))(range(2), 1)
    assert losses["loss_learn"] > 0 > losses["loss_forget"]


def test_a_child_process_that_fails_says_why():
    """Its last line of stdout comes back, or as the reason the error, the last line of stderr where none is named."""
    assert bench.run_python("import sys; print(1); print(sys.argv[1])", "two")[1] == "two"
    with pytest.raises(bench.NotMeasured, match="no luck"):
        bench.run_python("raise SystemExit('no luck')")
    with pytest.raises(bench.NotMeasured, match="OSError: full"):
        bench.run_python(
            "import atexit, sys; atexit.register(print, 'bye', file=sys.stderr); raise OSError('full')"
        )


# --- the table ---


def test_every_row_of_the_issue_is_in_the_table_in_its_order(folder):
    """What was measured has a ratio; what was left out by --rows says so."""
    text, lines = run(folder, "--rows", "step", "linear")
    assert [row.name for row in bench.ROWS] == list(ISSUE)
    assert len(lines) == len(ISSUE)
    for (name, words), cells in zip(ISSUE.items(), lines, strict=True):
        assert words in cells[0]
        measured = name in ("step", "linear")
        assert ("x (" in cells[2]) if measured else cells[2] == "not measured: left out by --rows"
    for words in (
        "# Benchmarks",
        "python dev/bench.py --quick",
        "torch ",
        "1 threads",
        "parameters",
    ):
        assert words in text


def test_memorisation_and_generation_rows_are_measured(folder):
    """Before and after for each length, with equal values; generation says the same tokens."""
    _, lines = run(folder, "--rows", "el", "generation")
    measured = [cells for cells in lines if "not measured" not in cells[2]]
    assert [cells[0].rpartition(": ")[2] for cells in measured[:4]] == [
        f"T = {T}, {when} unlearning"
        for T in bench.QUICK["lengths"]
        for when in ("before", "after")
    ]
    assert all("tokens through the model against" in cells[5] for cells in measured[:4])
    assert "the same tokens in" in measured[4][5]


def test_the_bound_and_the_trainer_rows_are_measured(folder):
    """A line for each length; no more must be decoded than ours decodes; the Trainer's losses are ours."""
    pytest.importorskip("accelerate")
    _, lines = run(folder, "--rows", "bound", "trainer")
    *bounds, trained = [cells for cells in lines if "x (" in cells[2]]
    assert [cells[0].rpartition(": ")[2] for cells in bounds] == [
        f"T = {T}" for T in bench.QUICK["lengths"]
    ]
    for cells in bounds:
        must, decoded = (
            int(n.replace(",", ""))
            for n in re.findall(r"([\d,]+)(?: tokens must|; plain)", cells[5])
        )
        assert 0 < must <= decoded
    ours, theirs = trained[5].split("mean loss of the last ")[1].split(";")[0].split(" / ")
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)


def test_an_audit_is_measured_before_and_after(folder):
    """Every question but relearning, on the model as it is and on one that has forgotten."""
    _, lines = run(folder, "--rows", "audit")
    details = [cells[0].rpartition(": ")[2] for cells in lines if "x (" in cells[2]]
    assert details == ["before unlearning", "after unlearning"]


def test_what_cannot_be_measured_says_why(folder, monkeypatch):
    """Without faiss, lm_eval, a GPU, rows of tasks, or texts that are long enough."""
    for module in ("faiss", "lm_eval"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(bench.QUICK, "lengths", (1000,))
    _, lines = run(folder, "--rows", "el", "knn", "tasks", "gpu")
    reasons = {name: cells[2] for name, cells in zip(ISSUE, lines, strict=True)}
    assert all(reason.startswith("not measured: ") for reason in reasons.values())
    assert "T = 1000" in reasons["el"] and "faiss" in reasons["knn"]
    assert "lm_eval" in reasons["tasks"] and "no CUDA GPU" in reasons["gpu"]


@needs_deepspeed
def test_zero_takes_the_steps_of_the_plain_engine(folder):
    """--quick on a CPU: both loops end at the same loss; the child has the texts that the table names."""
    (work,) = [cells[5] for cells in run(folder, "--rows", "zero")[1] if "x (" in cells[2]]
    assert work.startswith("2 steps of 4 + 4 rows"), work
    ours, theirs = work.split("mean loss of the last ")[1].split(";")[0].split(" / ")
    assert float(ours) == pytest.approx(float(theirs), abs=1e-4)


def test_zero_says_why_it_is_not_measured(setup, monkeypatch):
    """Without a GPU, or without DeepSpeed: the reason, and no child process."""
    monkeypatch.setattr(bench, "in_child", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    (row,) = [row for row in bench.ROWS if row.name == "zero"]
    for quick, reason in ((False, "pass --device cuda"), (True, "deepspeed is not installed")):
        setup.args.quick = quick
        (line,) = bench.measure_row(row, setup)
        assert line.measured.startswith("not measured: ") and reason in line.measured


def test_larger_models_need_no_fewer_cards_and_larger_cards_no_more():
    """The estimate of cards rises with the model and falls with the card."""

    def cards(cell):  # "24 GB: 3 (--offload: 2)" -> 3
        return int(cell.split(": ")[1].split()[0])

    table = [[cards(cell) for cell in line.measured.split("; ")] for line in bench.what_fits(None)]
    assert len(table) == 3 and table[0] == [1, 1, 1]
    assert all(
        a <= b
        for smaller, larger in zip(table, table[1:], strict=False)
        for a, b in zip(smaller, larger, strict=True)
    )
    assert all(row == sorted(row, reverse=True) for row in table) and table[2][0] > 1


def test_a_row_that_breaks_off_keeps_its_lines():
    """The lines before the error stay, the reason follows, on one line."""

    def measure(_):
        yield bench.Line("first", "1x")
        raise OSError("disk\nfull")

    setup = bench.Bench(*[None] * 6, bench.parse_args(["--quick"]))
    lines = list(bench.measure_row(bench.Row("x", "", "", measure), setup))
    assert [line.measured for line in lines] == ["1x", "not measured: disk full"]


def test_the_model_made_for_the_benchmark_has_pairs_that_fit_it(tmp_path, monkeypatch, save_tiny):
    """Texts of 200 tokens with their own ids, forget and learn apart; a second call finds them and makes nothing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_tiny("gpt_neo", tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    pool = [
        {"prefix": prefix, "suffix": f"{suffix} {i}"}
        for i, (prefix, suffix) in enumerate(TEXTS * 12)
    ]
    trained = []
    monkeypatch.setattr(bench.tiny, "make_corpus", lambda seed: ({"pool": pool}, tokenizer))
    monkeypatch.setattr(
        bench.tiny, "make_model", lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    )
    monkeypatch.setattr(
        bench.tiny, "train", lambda model, forget, learn, steps: trained.append((forget, learn))
    )
    for _ in range(2):
        bench.make_memorised(tmp_path / "made", 3, steps=1)
    ((forget, learn),) = trained
    pairs = data.read_pairs(tmp_path / "made" / "pairs.jsonl")
    samples, n_cut = icu.build_samples(pairs, tokenizer, protocol="released", positions=256)
    assert [sample.forget.ids for sample in samples] == forget and [
        sample.learn.ids for sample in samples
    ] == learn
    assert {len(ids) for ids in forget + learn} == {200} and n_cut == 0
    assert (
        json.loads((tmp_path / "made" / "model" / "config.json").read_text())["model_type"]
        == "gpt_neo"
    )


# --- flags ---


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--rows", "speed"], "speed"),
        (["--repeats", "0"], "--repeats"),
        (["--threads", "two"], "--threads"),
        (["--samples", "-1"], "--samples"),
        (["--device", "tpu"], "--device"),
        (["--model", "somewhere"], "--pairs"),
        (["--model", "/nowhere", "--pairs", "/nowhere.jsonl"], "/nowhere"),
        (["--tasks-data", "/nowhere"], "--tasks-data"),
        (["--out", "/"], "/"),
        (["--quik"], "--quik"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(flags, word, capsys, tmp_path):
    """Before any measurement, and nothing is written."""
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out.md")]
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: bench.main([*flags, *out, "--quick"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and word in error
    assert not list(tmp_path.iterdir())
