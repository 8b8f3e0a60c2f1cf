"""Rows of an embedding or head for the tokens of another tokenizer, from the rows that a model has.

A token that both tokenizers have keeps its row, bit for bit. Any other row is a linear combination of rows: of the
model's own sub-tokens of the same string, or of common tokens, with the coefficients that approximate the token's row
in a model that does have it (orthogonal matching pursuit: Pati et al. 1993). A method registers a function that finds
the coefficients; what they are applied to is the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from manticore_hf.compose.transplant.surface import Surfaces
from manticore_hf.modeling.configuration_manticore import ManticoreError

METHODS: dict[str, Callable] = {}
"""{name: function (plan, side, donor, atoms, progress) -> {token: (source tokens, coefficients)}}"""

ATOMS = 4
"""Common tokens that matching pursuit combines to one: more fit the donor better and the model worse."""

_LIKE = {"bos": "eos", "eos": "bos"}
_BATCH_ELEMENTS = 2**26  # of the largest tensor of a batch


@dataclass
class Plan:
    """Where each token of the new tokenizer comes from.

    Attributes:
        size: Rows to make.
        copied: {token: source token with the same bytes}.
        roles: {"input" or "head": {special token: source token of the same role or text}}.
        pieces: {token: source tokens that together stand for the same bytes; empty where there are none}.
        unmatched: Special tokens that the source has no counterpart of, and ids without a token.
    """

    size: int
    copied: dict = field(default_factory=dict)
    roles: dict = field(default_factory=lambda: {"input": {}, "head": {}})
    pieces: dict = field(default_factory=dict)
    unmatched: list = field(default_factory=list)

    def taken(self, side: str) -> dict[int, int]:
        """{token: source token} of all rows that are copied for "input", "head" or "tied" (one matrix for both)."""
        roles = self.roles[side] if side != "tied" else {**self.roles["input"], **self.roles["head"]}
        return {**self.copied, **roles}

    def coverage(self, pieces_only: bool = True) -> dict[str, int]:
        """Number of tokens by where their rows come from.

        Args:
            pieces_only: Whether a token without sub-tokens in the source cannot be built.
        """
        by_role = len({*self.roles["input"], *self.roles["head"]})
        lost = sum(not pieces for pieces in self.pieces.values()) if pieces_only else 0
        built = len(self.pieces) - lost
        return {"copied": len(self.copied), "by role": by_role, "built": built, "none": len(self.unmatched) + lost}


def match(source: Surfaces, target: Surfaces) -> Plan:
    """Compares two tokenizers' Surfaces; returns a Plan.

    Special tokens go by what they are for: a text of the new tokenizer begins with the token that plays the part of
    the old one's bos (or eos, which is what stands between documents), and its end is predicted by the row of eos. No
    other token gets that row of the head, or an end would be predicted several times over.
    """
    plan = Plan(target.size)
    for token, data in enumerate(target.bytes):
        if data and data in source.ids:
            plan.copied[token] = source.ids[data]
        elif data:
            plan.pieces[token] = source.spell(data)
    named = {number: text for text, number in target.special.items()}
    for token in (number for number, data in enumerate(target.bytes) if not data):
        played = [role for role, number in target.roles.items() if number == token]
        same = source.special.get(named.get(token))
        for side, order in (("input", ("bos", "eos", "pad", "unk")), ("head", ("eos", "bos", "unk", "pad"))):
            wanted = [role for role in order if role in played]
            wanted += [_LIKE[role] for role in wanted if role in _LIKE]
            candidates = [source.roles[role] for role in wanted if role in source.roles] + [same]
            if side == "head" and "eos" not in played:
                candidates = [number for number in candidates if number != source.roles.get("eos")]
            found = next((number for number in candidates if number is not None), None)
            if found is not None:
                plan.roles[side][token] = found
        if token not in plan.roles["input"] and token not in plan.roles["head"]:
            plan.unmatched.append(token)
    return plan


def method(name: str) -> Callable[[Callable], Callable]:
    """Registers a way of finding coefficients."""

    def register(function):
        METHODS[name] = function
        return function

    return register


@method("mean")
def mean_of_pieces(
    plan: Plan, side: str, donor: torch.Tensor | None = None, atoms: int | None = None, progress: bool = False
) -> dict[int, tuple[list[int], list[float]]]:
    """Means of the rows of a token's sub-tokens.

    An input row weighs each piece twice as much as the one before it: what a model reads is best said by the last
    piece. A head's row is the plain mean. (Its first piece alone, which is what the model would have predicted there,
    measured far worse: every token that begins with it gets its whole probability.)
    """
    out = {}
    for token, pieces in plan.pieces.items():
        if pieces:
            weights = [2.0**i if side == "input" else 1.0 for i in range(len(pieces))]
            out[token] = (pieces, [weight / sum(weights) for weight in weights])
    return out


@method("omp")
def sparse_in_common(
    plan: Plan, side: str, donor: torch.Tensor, atoms: int = ATOMS, progress: bool = False
) -> dict[int, tuple[list[int], list[float]]]:
    """As the donor's row is approximated by few of its rows of common tokens, so is the model's.

    Args:
        plan: Plan.
        side: "input" or "head".
        donor: [tokens, width] the donor's rows.
        atoms: Most common tokens for a row.
        progress: Show a progress bar.
    """
    common, wanted = list(plan.copied), list(plan.pieces)
    if not wanted or not common:
        return {}
    chosen, coefficients = matching_pursuit(donor[common], donor[wanted], atoms, progress)
    sources = torch.tensor([plan.copied[token] for token in common])[chosen.cpu()]
    return dict(zip(wanted, zip(sources.tolist(), coefficients.tolist())))


@torch.no_grad()
def matching_pursuit(
    dictionary: torch.Tensor, targets: torch.Tensor, atoms: int, progress: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonal matching pursuit, for many vectors at once.

    Args:
        dictionary: [rows, width] vectors to combine.
        targets: [count, width] vectors to approximate.
        atoms: Rows to choose for each.
        progress: Show a progress bar.

    Returns:
        (chosen [count, atoms] rows of the dictionary, coefficients [count, atoms] of least squares on them, zero for
        those that were not needed).
    """
    dictionary = dictionary.float()
    atoms = min(atoms, *dictionary.shape)
    norms = dictionary.norm(dim=1).clamp(min=1e-12)
    directions = (dictionary / norms[:, None]).T.contiguous()
    step = max(1, _BATCH_ELEMENTS // max(dictionary.shape[0], atoms * dictionary.shape[1]))
    parts = [
        _pursue(dictionary, directions, some.float(), atoms)
        for some in tqdm(targets.split(step), desc="Matching tokens", leave=False, disable=not progress)
    ]
    return torch.cat([chosen for chosen, _ in parts]), torch.cat([values for _, values in parts])


def _pursue(dictionary, directions, targets, atoms):
    """One batch: the residual is kept orthogonal to the chosen rows by Gram-Schmidt; the coefficients come last."""
    count, width = targets.shape
    left, basis = targets.clone(), targets.new_zeros(count, atoms, width)
    chosen = torch.zeros(count, atoms, dtype=torch.long, device=targets.device)
    used = torch.zeros(count, atoms, dtype=torch.bool, device=targets.device)
    size = targets.norm(dim=1).clamp(min=1e-12)
    for i in range(atoms):
        best = (left @ directions).abs_().argmax(1)
        vector = directions.T[best]
        for _ in range(2):  # once leaves what rounding brought in
            known = basis[:, :i]
            vector = vector - (known.transpose(1, 2) @ (known @ vector[:, :, None]))[:, :, 0]
        length = vector.norm(dim=1)
        # Nothing is left to explain, or the row adds nothing to those chosen
        useful = (left.norm(dim=1) > 1e-5 * size) & (length > 1e-4)
        vector = torch.where(useful[:, None], vector / length.clamp(min=1e-12)[:, None], 0.0)
        left = left - vector * (vector * left).sum(1, keepdim=True)
        basis[:, i], chosen[:, i], used[:, i] = vector, best, useful
    rows = dictionary[chosen].double() * used[:, :, None]
    gram = rows @ rows.transpose(1, 2) + torch.diag_embed((~used).double())
    coefficients = torch.linalg.solve(gram, (rows @ targets.double()[:, :, None]))[:, :, 0]
    return chosen, (coefficients * used).float()


def new_rows(weight: torch.Tensor, plan: Plan, side: str, coefficients: dict) -> torch.Tensor:
    """The rows of all tokens.

    Args:
        weight: [source tokens, width], or [source tokens] (a head's bias).
        plan: Plan.
        side: "input", "head" or "tied".
        coefficients: {token: (source tokens, their coefficients)}.

    Returns:
        [plan.size, width] in the dtype and on the device of `weight`; tokens that nothing is known of get the mean row.
    """
    flat = weight.detach()[:, None] if weight.ndim == 1 else weight.detach()
    out = flat.float().mean(0).to(flat.dtype).expand(plan.size, -1).clone()
    if coefficients:
        tokens = list(coefficients)
        places = [(row, one) for row, token in enumerate(tokens) for one in coefficients[token][0]]
        values = [value for token in tokens for value in coefficients[token][1]]
        shape = (len(tokens), len(flat))
        mix = torch.sparse_coo_tensor(torch.tensor(places).T, values, shape, device=flat.device, check_invariants=False)
        out[tokens] = torch.sparse.mm(mix, flat.float()).to(flat.dtype)
    taken = plan.taken(side)
    if taken:
        out[list(taken)] = flat[list(taken.values())]
    return out[:, 0] if weight.ndim == 1 else out


def check_method(name: str, donor: object | None) -> None:
    """Raises ManticoreError unless a method exists and has what it needs."""
    if name not in METHODS:
        raise ManticoreError(f"method={name!r} is unknown; choose 'auto' or one of {sorted(METHODS)}.")
    if name == "omp" and donor is None:
        raise ManticoreError(
            "method='omp' needs a donor, a model that has embeddings for the new tokenizer's tokens (for a hybrid its "
            "tokenizer component); give one, or method='mean'."
        )
