"""Publishing: what is uploaded, what is not, and licences."""

import json
import re
from pathlib import Path

import published
import pytest
from hub_models import assert_same_model, nudge, read_json, tiny, tokenizer
from huggingface_hub import HfApi, hf_hub_download
from published import component, exists
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, prune, publish
from manticore_hf.cli import main
from manticore_hf.hub.provenance import component_state, print_state
from manticore_hf.training.trained_stages import HybridTrainer

parts, saved = published.parts, published.saved
pytestmark = pytest.mark.usefixtures("counted_once")


# ---- what is uploaded ------------------------------------------------------------------------------------------------


def test_a_published_hybrid_loads_with_all_that_belongs_to_it(saved, hub, owner):
    out = publish(saved[1], f"{owner}/h")
    files = hub.files(f"{owner}/h")
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "modeling_manticore.py",
        "plots/mixture.png",
    } < set(files)
    assert {name: len(data) for name, data in files.items() if name != ".gitattributes"} == out.files
    assert out.commit == hub.head(f"{owner}/h")
    assert_same_model(AutoModelForCausalLM.from_pretrained(f"{owner}/h"), saved[0])
    assert AutoTokenizer.from_pretrained(f"{owner}/h").get_vocab() == tokenizer().get_vocab()
    assert b"model-index" not in files["README.md"] and b"license: apache-2.0" in files["README.md"]


def test_it_is_one_commit_and_says_what_referencing_saves(saved, hub, owner):
    out = publish(saved[1], f"{owner}/h")
    commits = [commit.title for commit in HfApi().list_repo_commits(f"{owner}/h")]
    assert commits == ["Publish hybrid", "initial commit"]
    whole = sum(len(hub.files(f"{owner}/{name}")["model.safetensors"]) for name in "ab")
    assert out.referenced_bytes == whole and sum(out.files.values()) > len(hub.files(f"{owner}/h")["model.safetensors"])


def test_what_was_trained_is_no_saving(saved, hub, owner):
    nudge(saved[0], "a.gpt_neox.embed_in.weight")
    out = publish(saved[0], f"{owner}/h")
    whole = sum(len(hub.files(f"{owner}/{name}")["model.safetensors"]) for name in "ab")
    assert out.referenced_bytes == whole - 4 * saved[0].a.gpt_neox.embed_in.weight.numel()
    assert "changed ones here" in hub.files(f"{owner}/h")["README.md"].decode()


def test_a_dry_run_lists_the_same_and_writes_nothing(saved, hub, owner, capsys):
    hub.clear_requests()
    assert main(["push", str(saved[1]), f"{owner}/h", "--dry-run"]) == 0
    assert {method for method, path in hub.requests if "validate-yaml" not in path} <= {"GET", "HEAD"}
    assert not exists(f"{owner}/h") and not (saved[1] / "README.md").exists()
    listed = capsys.readouterr().out
    out = publish(saved[1], f"{owner}/h")
    for name, size in out.files.items():
        assert re.search(rf"^ +{re.escape(name)} +{size:,} bytes$", listed, re.MULTILINE), name
    assert "Dry run" in listed and f"{out.referenced_bytes:,} bytes of component weights" in listed


def test_only_known_files_are_taken(saved, hub, owner):
    for name in (
        "optimizer.pt",
        "training_args.bin",
        "notes.txt",
        ".env",
        "model.safetensors.bak",
        "plots/notes.txt",
        "checkpoint-5/model.safetensors",
        "plots/a.png",
        "trainer_state.json",
        "runs/events",
    ):
        (saved[1] / name).parent.mkdir(exist_ok=True)
        (saved[1] / name).write_text("x")
    out = publish(saved[1], f"{owner}/h")
    assert "plots/a.png" in out.files
    strange = [name for name in out.files if not name.endswith(("_manticore.py", ".png", ".json", ".md"))]
    assert strange == ["model.safetensors"] and not any("checkpoint" in name for name in out.files)


def test_a_later_push_removes_what_would_be_read_in_its_place(saved, hub, owner, tmp_path):
    publish(saved[1], f"{owner}/h")
    api = HfApi()
    for name in (
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "old_manticore.py",
        "notes.md",
        "plots/old.png",
        "figures/x.png",
    ):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=f"{owner}/h")
    out = publish(saved[1], f"{owner}/h")
    assert out.deleted == [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "old_manticore.py",
        "plots/old.png",
    ]
    left = set(hub.files(f"{owner}/h"))
    assert {"notes.md", "figures/x.png"} < left and not left & set(out.deleted)
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h"), saved[0])


def test_embedded_and_pruned_hybrids(saved, hub, owner):
    parts = [ComponentSpec(tiny("gpt_neox"), name="a"), ComponentSpec(tiny("mamba"), name="b")]
    whole = ManticoreForCausalLM.from_components(parts)
    out = publish(whole, f"{owner}/whole", tokenizer=tokenizer())
    assert out.referenced_bytes == 0 and "tokenizer.json" in out.files
    assert [note for note in out.notices if "unknown" in note]
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/whole"), whole)
    hard = prune(saved[0], ["a", "b"])
    publish(hard, f"{owner}/hard")
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/hard"), hard)


def test_weights_in_shards(parts, hub, owner, tmp_path):
    model = ManticoreForCausalLM.from_components([ComponentSpec(part, embed=True) for part in parts])
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    out = publish(tmp_path / "out", f"{owner}/h")
    assert sum(name.endswith(".safetensors") for name in out.files) > 2
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h"), model)


def test_the_tokenizer_comes_from_where_there_is_one(saved, hub, owner, tmp_path):
    other = tokenizer(first=["other"])
    cases = {"component": {}, "given": {"tokenizer": other}}
    for name, options in cases.items():
        publish(saved[1], f"{owner}/{name}", **options)
    other.save_pretrained(saved[1])
    publish(saved[1], f"{owner}/directory")
    for name, wanted in (("component", tokenizer()), ("given", other), ("directory", other)):
        assert AutoTokenizer.from_pretrained(f"{owner}/{name}").get_vocab() == wanted.get_vocab()


def test_a_recipe_is_published_and_shown(saved, hub, owner, tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\ndata: {data: org/books}\nstages: []\n")
    publish(saved[1], f"{owner}/h", recipe=tmp_path / "mine.yaml")
    files = hub.files(f"{owner}/h")
    assert files["recipe.yaml"] == (tmp_path / "mine.yaml").read_bytes() and b"- org/books" in files["README.md"]
    assert not (saved[1] / "recipe.yaml").exists()
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h"), saved[0])


# ---- where it goes ---------------------------------------------------------------------------------------------------


def test_private_branch_and_pull_request(saved, hub, owner):
    publish(saved[1], f"{owner}/h", private=True)
    assert HfApi().model_info(f"{owner}/h").private
    first = hub.head(f"{owner}/h")
    out = publish(saved[1], f"{owner}/h", private=False, revision="try", commit_message="Second", tags=["two"])
    assert hub.head(f"{owner}/h") == first and hub.head(f"{owner}/h", "try") == out.commit
    assert any("stays private" in notice for notice in out.notices)
    assert_same_model(ManticoreForCausalLM.from_pretrained(f"{owner}/h", revision="try"), saved[0])
    out = publish(saved[1], f"{owner}/h", create_pr=True, tags=["three"])
    assert hub.head(f"{owner}/h") == first and hub.head(f"{owner}/h", "refs/pr/1") == out.commit
    assert "discussions/1" in out.url


def test_what_someone_commits_meanwhile_is_not_lost(saved, hub, owner, monkeypatch):
    publish(saved[1], f"{owner}/h")
    commit = HfApi.create_commit

    def slow(self, repo_id, operations, **options):
        monkeypatch.undo()
        self.upload_file(path_or_fileobj=b"theirs", path_in_repo="README.md", repo_id=repo_id)
        return commit(self, repo_id, operations, **options)

    monkeypatch.setattr(HfApi, "create_commit", slow)
    with pytest.raises(ManticoreError, match="changed by someone else meanwhile"):
        publish(saved[1], f"{owner}/h", tags=["new"])
    assert hub.files(f"{owner}/h")["README.md"] == b"theirs"


# ---- the card --------------------------------------------------------------------------------------------------------


def edit_on_the_hub(repo_id, old, new):
    text = Path(hf_hub_download(repo_id, "README.md", force_download=True)).read_text()
    assert old in text
    HfApi().upload_file(path_or_fileobj=text.replace(old, new).encode(), path_in_repo="README.md", repo_id=repo_id)


def test_text_that_a_person_added_survives(saved, hub, owner):
    repo_id = f"{owner}/h"
    publish(saved[1], repo_id)
    edit_on_the_hub(repo_id, "## Limits", "## Why\n\nBecause.\n\n## Limits of mine")
    (saved[1] / "evaluation.json").write_text(json.dumps({"losses": {"a": 2.0, "hybrid": 1.0}}))
    out = publish(saved[1], repo_id)
    text = hub.files(repo_id)["README.md"].decode()
    assert "Because." in text and "Limits of mine" in text and "1.0000" in text
    assert any("'limits'" in notice for notice in out.notices)
    assert (saved[1] / "README.md").read_text() == text
    local = text.replace("## Results", "My remark.\n\n## Results")
    (saved[1] / "README.md").write_text(local)
    publish(saved[1], repo_id)
    assert {"My remark.", "Because."} <= set(hub.files(repo_id)["README.md"].decode().splitlines())
    edit_on_the_hub(repo_id, "Because.", "Because of that.")
    (saved[1] / "README.md").write_text(local + "More.")
    with pytest.raises(ManticoreError, match="--card local"):
        publish(saved[1], repo_id)
    publish(saved[1], repo_id, card="hub")
    assert "Because of that." in hub.files(repo_id)["README.md"].decode()


def test_a_tuned_and_saved_hybrid_keeps_the_card_it_came_with(saved, hub, owner, tmp_path):
    publish(saved[1], f"{owner}/h")
    edit_on_the_hub(f"{owner}/h", "## Limits", "Written by hand.\n\n## Limits")
    model = ManticoreForCausalLM.from_pretrained(f"{owner}/h")
    nudge(model, "hybrid_mixer.alpha_logits")
    model.save_pretrained(tmp_path / "tuned")
    assert "Written by hand." in (tmp_path / "tuned" / "README.md").read_text()
    for name, what in (("directory", tmp_path / "tuned"), ("instance", model)):
        publish(what, f"{owner}/{name}")
        text = hub.files(f"{owner}/{name}")["README.md"].decode()
        assert "Written by hand." in text and f'from_pretrained("{owner}/{name}"' in text
        assert f"{owner}/h" not in text.partition("<!-- manticore-hf:card")[0]
    again = ManticoreForCausalLM.from_pretrained(tmp_path / "tuned")
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (tmp_path / "tuned" / "README.md").read_bytes()
    again.push_to_hub(f"{owner}/plain")
    assert "Written by hand." in hub.files(f"{owner}/plain")["README.md"].decode()


def test_saving_leaves_a_card_of_the_directory_alone(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("Mine.")
    (saved[1] / "README.md").write_text("Theirs.")
    ManticoreForCausalLM.from_pretrained(saved[1]).save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "README.md").read_text() == "Mine."


ROWS = [{"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6]}] * 8


@pytest.mark.parametrize("kind", [Trainer, HybridTrainer])
def test_trainers_push_hybrids_that_load(saved, hub, owner, tmp_path, kind):
    repo_id = f"{owner}/h"
    publish(saved[1], repo_id)
    edit_on_the_hub(repo_id, "## Limits", "Written by hand.\n\n## Limits")
    model = ManticoreForCausalLM.from_pretrained(repo_id)
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id=repo_id,
        save_strategy="no",
    )
    trainer = kind(model, arguments, train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub(dataset="org/books")
    assert_same_model(ManticoreForCausalLM.from_pretrained(repo_id), trainer.model)
    text = hub.files(repo_id)["README.md"].decode()
    # The Trainer of Transformers writes a card of its own.
    assert ("Written by hand." in text) == ("changed ones here" in text) == (kind is HybridTrainer)
    assert "org/books" in text


# ---- components ------------------------------------------------------------------------------------------------------


def test_licences_that_conflict_stop_it(hub, owner, tmp_path):
    component(hub, f"{owner}/a", "gpt_neox", tmp_path / "src", "---\nlicense: gpl-3.0\n---\n")
    component(hub, f"{owner}/b", "mamba", tmp_path / "src", "---\nlicense: cc-by-nc-4.0\n---\n")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    with pytest.raises(ManticoreError, match="gpl-3.0.*cc-by-nc-4.0.*cannot be combined.*not legal advice"):
        publish(model, f"{owner}/h")
    assert not exists(f"{owner}/h")
    out = publish(model, f"{owner}/h", override_licenses=True)
    assert any("Overridden" in notice for notice in out.notices)
    text = hub.files(f"{owner}/h")["README.md"].decode()
    assert "**Conflict:**" in text and "license: other" in text and "LICENSE.md" in out.files


def test_commercial_use_and_a_licence_of_ones_own(hub, owner, tmp_path, capsys):
    component(hub, f"{owner}/a", "gpt_neox", tmp_path / "src", "---\nlicense: cc-by-nc-4.0\n---\n")
    model = ManticoreForCausalLM.from_components([f"{owner}/a"])
    model.save_pretrained(tmp_path / "out")
    publish(model, f"{owner}/free", dry_run=True)
    assert main(["push", str(tmp_path / "out"), f"{owner}/h", "--commercial"]) == 2
    assert "excludes commercial use" in capsys.readouterr().err
    with pytest.raises(ManticoreError, match="not satisfied by mit"):
        publish(model, f"{owner}/h", license="mit")
    with pytest.raises(ManticoreError, match="'my-own'.*not in the table"):
        publish(model, f"{owner}/h", license="my-own")
    publish(model, f"{owner}/h", license="cc-by-nc-sa-4.0")
    assert "license: cc-by-nc-sa-4.0" in hub.files(f"{owner}/h")["README.md"].decode()


def test_unknown_licences_are_said_and_read_again(hub, owner, tmp_path):
    component(hub, f"{owner}/a", "gpt_neox", tmp_path / "src", None)
    model = ManticoreForCausalLM.from_components([f"{owner}/a"])
    out = publish(model, f"{owner}/h", dry_run=True)
    assert any("licence of component 'a' is unknown" in notice for notice in out.notices)
    component(hub, f"{owner}/b", "gpt_neox", tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/b"])
    model.config.components[0]["license"] = None  # as of a hybrid that was made offline
    publish(model, f"{owner}/h")
    assert "license: mit" in hub.files(f"{owner}/h")["README.md"].decode()


def test_components_that_not_everyone_can_read_are_said(hub, owner, tmp_path):
    component(hub, f"{owner}/a", "gpt_neox", tmp_path / "src", private=True)
    commit = component(hub, f"{owner}/b", "mamba", tmp_path / "src")
    model = ManticoreForCausalLM.from_components([f"{owner}/a", f"{owner}/b"])
    hub._storage.repos[f"{owner}/b"].gated = "auto"
    out = publish(model, f"{owner}/h")
    assert [notice for notice in out.notices if f"{owner}/a is private" in notice]
    assert [notice for notice in out.notices if f"{owner}/b is gated" in notice]
    text = hub.files(f"{owner}/h")["README.md"].decode()
    assert "is private: only who has access" in text and "is gated" in text and commit in text


def test_a_component_that_is_gone_stops_it(saved, owner):
    HfApi().delete_repo(f"{owner}/b")
    with pytest.raises(ManticoreError, match=f"'b' .{owner}/b@.*nobody could load.*embed=True"):
        publish(saved[1], f"{owner}/h")
    assert not exists(f"{owner}/h")


def test_what_the_hub_answers_for_a_component_is_said_with_what_to_do(saved, hub, owner):
    for status, remedy in ((403, "ask its owner for access"), (429, "too many requests"), (503, "has trouble")):
        hub.fault(f"/api/models/{owner}/b", "status", times=-1, status=status)
        with pytest.raises(ManticoreError, match=rf"'b' .{owner}/b@.*nothing was published.*{status}: .*{remedy}"):
            publish(saved[1], f"{owner}/h")
        entry = next(one for one in read_json(saved[1])["components"] if one["name"] == "b")
        state = component_state(entry)
        assert state["access"] == "unknown" and f"the Hub answers {status}: " in print_state(state)
        hub.clear_faults()
    assert not exists(f"{owner}/h")


def test_a_reference_that_can_move_stops_it(saved, owner):
    values = read_json(saved[1])
    values["components"][0]["revision"] = "main"
    (saved[1] / "config.json").write_text(json.dumps(values))
    with pytest.raises(ManticoreError, match="name that can move; load the hybrid and save it again"):
        publish(saved[1], f"{owner}/h")
