"""`manticore-hf composition`: what its texts say, what each condition trains, and what is not run twice."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from manticore_hf import ManticoreError
from manticore_hf.cli import main
from manticore_hf.experiments.composition import train_composition
from manticore_hf.experiments.composition.conditions import build, calibrate, conditions
from manticore_hf.experiments.composition.texts import CHARACTERS, TEXTS, CompositionTask, generate, table
from manticore_hf.experiments.composition.train_composition import Composition, CompositionTraining
from manticore_hf.experiments.scratch_models import from_scratch
from manticore_hf.training.calibrate import RIDGES

SMALL = CompositionTask(num_keys=40, num_table=300, num_sums=300, num_train=200, num_test=100, seed=5)
TINY = "--num-keys 40 --num-table 32 --num-sums 32 --num-train 32 --num-test 10 --hidden-size 32 --seeds 3".split()


def read(text, task=SMALL):
    """[(a row as characters, its labels as characters, '.' where nothing is asked)]."""
    ids, labels = generate(task, text)
    return [
        ("".join(CHARACTERS[i] for i in row), "".join("." if i < 0 else CHARACTERS[i] for i in asked))
        for row, asked in zip(ids.tolist(), labels.tolist())
    ]


def known(task=SMALL):
    keys, values = table(task)
    return {"".join(CHARACTERS[i] for i in key): int(value) for key, value in zip(keys.tolist(), values)}


def test_the_table_has_as_many_keys_of_every_value_in_both_halves():
    values = list(known().values())
    assert len(known()) == 40 and all(re.fullmatch("[a-z]{2}", key) for key in known())
    for half in (values[:20], values[20:]):
        assert sorted(half) == sorted(2 * [*range(10)])


def test_the_table_is_written_truly_and_wholly_and_omissions_are_not_learned():
    seen, omitted = set(), 0
    for row, asked in read("table"):
        assert len(row) == SMALL.length
        items = re.findall(r"([a-z]{2}):(\d?)([;+=])", row)
        assert row.startswith("".join(f"{key}:{value}{end}" for key, value, end in items))
        for key, value, _ in items:
            assert value in ("", str(known()[key]))
        seen |= {key for key, value, _ in items if value}
        omitted += sum(not value for _, value, _ in items)
        gone = {found.end() - 1 for found in re.finditer(r":[;+=]", row)}
        assert [i for i, one in enumerate(asked) if one == "."] == sorted(gone)
        assert all(one in (".", char) for char, one in zip(row, asked))
    assert seen == set(known())
    assert 0.2 < omitted / (300 * 9) < 0.3


def test_sums_are_right_whatever_the_numbers_are_called():
    names, number = set(), r"([a-z]{0,2}:?)(\d)"
    for row, asked in read("sums"):
        items = list(re.finditer(rf"{number}\+{number}=(\d\d);", row))
        assert "".join(one[0] for one in items) == row[: items[-1].end()]
        wanted = ["."] * len(row)
        for one in items:
            assert int(one[2]) + int(one[4]) == int(one[5])
            wanted[one.start(5) : one.end(5)] = one[5]
            names |= {re.sub("[a-z]", "x", one[i]) for i in (1, 3)}
        assert "".join(wanted)[: items[-1].end()] == asked[: items[-1].end()]
    assert names == {"", "x", "x:", "xx", "xx:"}


@pytest.mark.parametrize("text", ["train", "trained-keys", "test"])
def test_pairs_are_of_one_half_and_their_sums_right(text):
    mine, seen = (list(known())[20:] if text == "test" else list(known())[:20]), set()
    for row, asked in read(text):
        items = re.findall(r"([a-z]{2}):\+([a-z]{2}):=(\d\d);", row)
        assert "".join("{}:+{}:={};".format(*one) for one in items) == row and len(items) == SMALL.pairs
        assert asked == "".join(f"........{one[2]}." for one in items)
        keys = [key for one in items for key in one[:2]]
        assert len(set(keys)) == len(keys) and set(keys) <= set(mine)
        assert all(known()[a] + known()[b] == int(result) for a, b, result in items)
        seen |= set(keys)
    assert seen == set(mine)


def test_what_is_trained_on_names_no_key_of_the_test():
    unseen = set(list(known())[20:])
    assert not unseen & {key for row, _ in read("train") for key in re.findall("[a-z]{2}", row)}


def test_texts_are_the_same_again_and_others_with_another_seed():
    for text in TEXTS:
        assert read(text) == read(text) != read(text, CompositionTask(**{**vars(SMALL), "seed": 6}))


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"num_keys": 41}, "num_keys=41 must be even"),
        ({"num_keys": 678}, "at most 676"),
        ({"num_keys": 14}, "give at least 16"),
        ({"omitted": 1.0}, "omitted=1.0 must be a share"),
        ({"pairs": 0}, "pairs=0 must be a whole number"),
    ],
)
def test_settings_that_cannot_be_raise(wrong, says):
    with pytest.raises(ManticoreError, match=says):
        CompositionTask(**wrong)
    with pytest.raises(ManticoreError, match="'tables' is unknown"):
        generate(SMALL, "tables")


def test_each_condition_trains_what_it_says_and_starts_from_its_components():
    sizes = SMALL.vocab_size, 3, 32, SMALL.positions

    def component(name):
        return from_scratch(SMALL.parts[name].family, *sizes, seed=7)

    ids = torch.from_numpy(generate(SMALL, "test")[0][:3])
    adder = component("adder").eval()(input_ids=ids).logits
    for name, condition in conditions(3).items():
        model = build(condition, component, 7).eval()
        trained = {one.split(".")[0] for one, p in model.named_parameters() if p.requires_grad}
        if condition.gates:
            assert [one for one, p in model.named_parameters() if p.requires_grad] == ["hybrid_mixer.bridges.gates"]
        elif len(condition.parts) == 2:
            assert trained == {"hybrid_mixer", *condition.tuned}, name
        elif condition.lora:
            trained = [one for one, p in model.named_parameters() if p.requires_grad]
            assert all("lora_" in one for one in trained)
            size = sum(p.numel() for p in model.parameters() if p.requires_grad)
            one = size / model.peft_config["default"].r
            assert abs(size - 3 * 32**2) <= one / 2  # no other rank is nearer to the bridges
        else:
            assert all(p.requires_grad for p in model.parameters())
        if condition.reads or condition.parts == ("adder",):  # where it starts: the adder alone, to the bit
            assert torch.equal(model(input_ids=ids).logits, adder), name
    bridge = build(conditions(3)["linear bridge"], component, 7)
    assert [(e["from"], e["to"], e["from_block"], e["to_block"]) for e in bridge.config.bridges] == [
        ("table", "adder", 2, block) for block in range(3)
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_calibrated_bridge_says_the_next_token_in_the_receivers_embeddings(quiet):
    """Beside least squares without a bias, token by token; other bridges stay zero, and both models as they were."""
    sizes = SMALL.vocab_size, 3, 32, SMALL.positions
    model = build(
        conditions(3)["calibrated bridge frozen"],
        lambda name: from_scratch(SMALL.parts[name].family, *sizes, seed=7),
        7,
    )
    before = {name: value.clone() for name, value in model.state_dict().items() if "bridges" not in name}
    ids = torch.from_numpy(generate(SMALL, "table")[0][:100])
    own = torch.from_numpy(generate(SMALL, "sums")[0][:100]) if quiet else None
    found = calibrate(model.eval(), ids, own)
    first, *rest = model.hybrid_mixer.bridges.edges
    assert all(not one.up.weight.any() for one in rest)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())

    embedding, rows = model.component("adder").get_input_embeddings().weight.double(), {"fit": [], "chosen": []}
    texts = [(row, i, True) for i, row in enumerate(ids)] + [
        (row, i, False) for i, row in enumerate(own if quiet else ())
    ]
    for row, i, told in texts:
        with torch.no_grad():
            states = model.component("table").backbone(row[None]).last_hidden_state[0]
            sure = model.component("table").lm_head(states).softmax(-1).max(-1)[0].double() ** quiet
        for t in range(len(row) - 1):
            x = states[t].double() / states[t].double().square().mean().add(1e-6).sqrt()
            y = embedding[row[t + 1]] / embedding[row[t]].square().mean().add(1e-6).sqrt()
            y = y * told
            rows["fit" if i < 90 else "chosen"].append((sure[t] * x, sure[t] * y))
    (x, y), (new, wanted) = ([torch.stack(one).detach() for one in zip(*part)] for part in rows.values())
    best = None
    for ridge in RIDGES:
        gram = x.T @ x
        weight = torch.linalg.solve(gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)), x.T @ y).T
        share = 1 - (new @ weight.T - wanted).square().sum() / wanted.square().sum()
        best = max(best or (share, weight), (share, weight), key=lambda one: one[0])
    assert found == pytest.approx(float(best[0]), abs=1e-4) and 0 < found < 1
    torch.testing.assert_close(first.up.weight.double(), best[1], atol=1e-3, rtol=1e-3)


def results(folder):
    return {data["model"]: data for data in (json.loads(file.read_text()) for file in folder.glob("*.json"))}


def test_all_conditions_run_are_printed_and_not_run_again(tmp_path, capsys, monkeypatch):
    names = ["adder tuned", "gate frozen", "linear bridge", "calibrated bridge untrained"]
    command = ["composition", *TINY, "--output-dir", str(tmp_path), "--only"]
    assert main([*command, *names[:2]]) == 0
    assert set(results(tmp_path)) == {"adder", "table", *names[:2]}
    files = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    capsys.readouterr()
    assert main([*command, *names]) == 0
    assert set(results(tmp_path)) == {"adder", "table", *names}
    assert all(file.stat().st_mtime_ns == time for file, time in files.items())
    printed = capsys.readouterr().out
    for name, result in results(tmp_path).items():
        if name in names:
            assert f"{result['unseen']:13.3f}{result['trained']:14.3f}" in printed.split(f"\n{name} ")[1]
            assert result["steps"] == (0 if "untrained" in name else 2)
    monkeypatch.setattr(train_composition.Composition, "_arguments", lambda self: pytest.fail("something was trained"))
    assert main([*command, *names]) == 0
    assert capsys.readouterr().out == printed


def test_another_setting_is_another_run(tmp_path):
    command = ["composition", *TINY, "--output-dir", str(tmp_path), "--only", "gate frozen"]
    assert main(command) == 0 and main([*command, "--num-train", "16"]) == 0
    assert len(list(tmp_path.glob("composition-gate-frozen-*.json"))) == 2
    assert len(list(tmp_path.glob("composition-table-*.json"))) == 1  # whom it does not concern


def test_the_score_is_the_share_of_right_sums(tmp_path):
    """Once more, sum by sum, of the component that was kept."""
    task, training = CompositionTask(num_keys=40, num_test=10, num_train=16, num_sums=400, num_table=16), 32
    one = Composition(task, tmp_path, CompositionTraining(hidden_size=training), True)
    one.compare({"adder LoRA": conditions(3)["adder LoRA"]})
    adder = one.component("adder").eval()
    kept = load_file(next(tmp_path.glob("composition-adder-*.safetensors")))
    assert all(torch.equal(value, adder.state_dict()[name]) for name, value in kept.items())
    found = one._score([adder])
    for asked, text in (("unseen", "test"), ("trained", "trained-keys")):
        hits = []
        for row in generate(task, text)[0].tolist():
            for end in (i for i, token in enumerate(row) if CHARACTERS[token] == ";"):
                with torch.no_grad():
                    said = adder(input_ids=torch.tensor([row[:end]])).logits[0].argmax(-1).tolist()
                hits.append(said[end - 3 : end - 1] == row[end - 2 : end])
        assert found[asked] == sum(hits) / len(hits) and len(hits) == 40


def test_what_a_component_can_alone_is_asked_of_it_alone(tmp_path, monkeypatch):
    """Of a table that knows one value in two, and an adder that is wrong wherever it has to carry."""
    one, known_to = Composition(SMALL, tmp_path, CompositionTraining(), True), known()

    def answers(name):
        def forward(input_ids):
            logits = torch.zeros(*input_ids.shape, SMALL.vocab_size)
            for row, ids in enumerate(input_ids.tolist()):
                text = "".join(CHARACTERS[i] for i in ids)
                for at in re.finditer("[a-z]{2}:", text):
                    value = known_to[at[0][:2]]
                    logits[row, at.end() - 1, value if value % 2 else value + 1] = 1
                for at in re.finditer(r"(\d)\+[a-z]{2}(\d)=", text):
                    total = int(at[1]) + int(at[2])
                    logits[row, at.end() - 1, 0] = logits[row, at.end(), total % 10] = 1
            return type("Out", (), {"logits": logits})

        return type("Model", (), {"eval": lambda self: forward})()

    monkeypatch.setattr(one, "component", answers)
    keys = [known_to[key] for row, _ in read("test") for key in re.findall("([a-z]{2}):", row)]
    sums = [int(total) for row, _ in read("test") for total in re.findall(r"=(\d\d);", row)]
    share = {"table": sum(value % 2 for value in keys) / len(keys), "adder": sum(x < 10 for x in sums) / len(sums)}
    assert one.alone() == pytest.approx(share) and all(0.3 < value < 0.8 for value in share.values())


def test_conditions_that_are_not_there_and_too_few_layers_raise(tmp_path):
    with pytest.raises(ManticoreError, match=r"\['bridges'\] are not conditions"):
        train_composition.run_composition(SMALL, tmp_path, only=["bridges"])
    with pytest.raises(ManticoreError, match="layers=2: 3 blocks"):
        train_composition.run_composition(SMALL, tmp_path, CompositionTraining(layers=2))
