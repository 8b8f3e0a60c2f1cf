"""A plan as text."""

from typing import Any

from manticore_hf.utils.formatting import plural, short_bytes, short_count, short_duration


def print_plan(plan: dict[str, Any]) -> None:
    """Prints what `make_plan` returns."""
    given = plan["assumptions"]
    print(
        f"{plan['name']}: {short_count(plan['parameters'])} parameters, {short_bytes(plan['bytes'])} in "
        f"{plan['dtype']}; on {given['devices']} x {short_bytes(given['memory'])} ({given['device']})"
    )
    width = max([len(one["name"]) for one in plan["components"]] + [len("mixer and projectors")])
    heads = ("parameters", "weights", "cache/token", "state", f"cache at {plan['cache_tokens']}")
    print(f"\n{'part':{width}}" + "".join(f"{head:>16}" for head in heads))
    for one in plan["components"]:
        cache = plan["cache"][one["name"]]
        sizes = [short_bytes(cache[key]) if cache[key] else "-" for key in ("per_token", "constant", "total")]
        cells = [f"{one['parameters']:,}", short_bytes(one["bytes"]), *sizes]
        print(f"{one['name']:{width}}" + "".join(f"{cell:>16}" for cell in cells))
    totals = [sum(one[key] for one in plan["cache"].values()) for key in ("per_token", "constant", "total")]
    print(f"{'mixer and projectors':{width}}{plan['own_parameters']:>16,}")
    cells = [f"{plan['parameters']:,}", short_bytes(plan["bytes"])] + [short_bytes(x) if x else "-" for x in totals]
    print(f"{'hybrid':{width}}" + "".join(f"{cell:>16}" for cell in cells))
    for stage in plan["stages"]:
        _print_stage(stage, given)
    print(f"\n{plan['verdict']}")
    print(
        f"\nAssumed: {short_bytes(given['usable'])} usable on every device ({given['reserve']:.0%} left free); "
        f"{given['flops']:.3g} FLOP/s at {given['utilization']:.0%}; {given['kernels']}."
    )
    for note in plan["notes"]:
        print(f"Assumed: {note}.")


def _print_stage(stage, given):
    precision = stage["dtype"] + (f", autocast {stage['autocast']}" if stage["autocast"] else "")
    print(
        f"\n{stage['stage']}: {plural(stage['batch'], 'row')} x {stage['length']} tokens per device"
        f"{'' if stage['accumulation'] == 1 else ', ' + str(stage['accumulation']) + ' accumulated'}; {precision}; "
        f"{short_count(stage['trainable'])} trained"
    )
    heads = ("weights", "gradients", "optimizer", "activations", "other", "peak")
    width = max(len(one["engine"]) for one in [*stage["options"], stage["choice"] or stage["options"][0]])
    evaluating = any("evaluation" in one["parts"] for one in stage["options"])
    print(f"  {'on one device':{width}}" + "".join(f"{head:>13}" for head in heads))
    for one in stage["options"]:
        parts = dict(one["parts"])
        evaluated = " (evaluation)" * ("evaluation" in parts)  # what comes last is more than the training
        parts.setdefault("activations", parts.pop("evaluation", 0))
        shown = [parts.pop(key, None) for key in heads[:4]]
        cells = [*map(short_bytes, shown), short_bytes(sum(parts.values())) if parts else "-", short_bytes(one["peak"])]
        fits = f"  {'fits' if one['fits'] else 'too much'}{evaluated}"
        print(f"  {one['engine']:{width}}" + "".join(f"{cell:>13}" for cell in cells) + fits)
    if evaluating:
        print("  (evaluation): the most is held while validating, when there are no gradients")
    choice, tokens = stage["choice"], stage["tokens"]
    way = "does not fit" if choice is None else f"{choice['engine']}, {short_bytes(choice['peak'])} per device"
    print(f"  -> {way}: {'; '.join(stage['advice'])}")
    time = (
        f"{_time(stage['hours'])} for {short_count(tokens)} tokens ({stage['counted']})"
        if tokens
        else (f"{_time(stage['hours_per_billion_tokens'])} per 1 G tokens ({stage['counted']})")
    )
    print(f"  {short_count(stage['flops_per_token'])}FLOP per token, {time}")


def _time(hours):
    return short_duration(None if hours is None else 3600 * hours, "?")
