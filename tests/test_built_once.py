"""A copy of a model that was built once is as good as one that is built for the test."""

import families
import hub_models
import pytest
import torch
from built_once import built_once
from hub_models import assert_same_model

BUILDERS = {
    "tiny": (families.tiny, ("llama", 1), {"hidden_size": 48}),
    "hybrid": (families.hybrid, ("gpt_neox+mamba",), {"num_blocks": 2, "mixture": "static"}),
    "on the Hub": (hub_models.tiny, ("jamba",), {}),
}


def step(model):
    """One step of training; returns the gradients."""
    ids = torch.arange(3, 15)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    found = {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_a_copy_is_as_good_as_a_new_one(name, tmp_path):
    build, args, kwargs = BUILDERS[name]
    build(*args, **kwargs), torch.manual_seed(7)
    copied, after_copy = build(*args, **kwargs), torch.get_rng_state()
    torch.manual_seed(7)
    new, after_new = build.__wrapped__(*args, **kwargs), torch.get_rng_state()
    assert torch.equal(after_copy, after_new), "numbers drawn next would be others"
    assert type(copied) is type(new) and copied.training == new.training
    assert_same_model(copied, new)
    for folder, model in (("copied", copied), ("new", new)):
        model.save_pretrained(tmp_path / folder)
    files = [{file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()} for folder in ("copied", "new")]
    assert files[0] == files[1]
    assert [one.requires_grad for one in copied.parameters()] == [one.requires_grad for one in new.parameters()]
    first, second = step(copied), step(new)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    for key, value in new.state_dict().items():
        assert torch.equal(copied.state_dict()[key], value), key


def test_what_is_done_to_a_copy_is_done_to_it_alone():
    one = families.hybrid("gpt_neox+mamba")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    one.config.num_blocks, one.config.gpt_neox.hidden_size, one.mine = 7, 1, True
    again = families.hybrid("gpt_neox+mamba")
    assert_same_model(again, families.hybrid.__wrapped__("gpt_neox+mamba"))
    assert again.config.num_blocks == 2 and again.config.gpt_neox.hidden_size == 32 and not hasattr(again, "mine")


def test_other_arguments_and_surroundings_build_anew():
    calls = []

    @built_once
    def build(*args, **kwargs):
        calls.append((args, kwargs))
        return torch.nn.Linear(2, 2)

    assert build(1, a=[2]) is not build(1, a=[2]) and len(calls) == 1
    build(1), build(2), build(1, a=[3]), build(1, b=[2])
    assert len(calls) == 5
    with torch.device("meta"):
        assert build(1).weight.is_meta and len(calls) == 6
    assert not build(1).weight.is_meta and len(calls) == 6
    with torch.no_grad():
        build(1)
    assert len(calls) == 7
