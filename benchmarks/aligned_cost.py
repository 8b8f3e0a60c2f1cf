"""What reading text by several tokenizers costs: training steps and decoding of an aligned hybrid, by CPU time.

    python benchmarks/aligned_cost.py --models DIR_A DIR_B --names a b --text wiki.txt

The hybrid has the tokenizer of the first model; the results hold one entry for each that was first. A training step
(forward, backward, all weights) on a text is compared with one step of each component on its own tokens of that text;
decoding, with a cache and token by token along the text, with each component decoding its own tokens of it. Each is
run once to warm up (the mapping remembers what it has found) and then measured; the first run is given, too. The
profile says which share of the hybrid's time is whose: components, the reading of bytes, finding which tokens may
follow which, and the sums over both vocabularies.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from manticore_hf.modeling import aligned_hybrid, aligned_reading
from manticore_hf.modeling.aligned_hybrid import aligner_of
from transformers import DynamicCache

from manticore_hf import ComponentSpec, ManticoreForCausalLM
from manticore_hf.utils.files import write_json

RESULTS = Path(__file__).parent / "results" / "aligned_cost.json"


class Shares:
    """CPU seconds inside some functions, without what they call of each other."""

    def __init__(self):
        self.seconds, self.open = {}, []

    def watch(self, owner, name, label):
        """Replaces a function or method by one that is timed."""
        plain = getattr(owner, name)

        def timed(*args, **kwargs):
            start, inner = time.process_time(), [0.0]
            self.open.append(inner)
            try:
                return plain(*args, **kwargs)
            finally:
                whole = time.process_time() - start
                self.open.pop()
                self.seconds[label] = self.seconds.get(label, 0.0) + whole - inner[0]
                if self.open:
                    self.open[-1][0] += whole

        setattr(owner, name, timed)


def cpu(run):
    """(CPU seconds of a call, what the watched functions took of it)."""
    SHARES.seconds.clear()
    start = time.process_time()
    run()
    return time.process_time() - start, dict(SHARES.seconds)


def step(model, ids):
    def run():
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return run


def decode(model, ids, prompt, cache):
    @torch.no_grad()
    def run():
        kept = cache()
        model(input_ids=ids[:, :prompt], cache=kept)
        start = time.process_time()
        SHARES.seconds.clear()
        for place in range(prompt, ids.shape[1]):
            model(input_ids=ids[:, place : place + 1], cache=kept)
        run.seconds = time.process_time() - start

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs=2, required=True, help="Directories or repositories.")
    parser.add_argument("--names", nargs=2, default=["a", "b"], help="What the results call the models.")
    parser.add_argument("--text", type=Path, required=True, help="A text, UTF-8.")
    parser.add_argument("--bytes", type=int, default=1200, help="Of it, for a training step.")
    parser.add_argument("--decoded", type=int, default=150, help="Bytes of it that are decoded after as many.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    specs = [ComponentSpec(source, name=name) for source, name in zip(options.models, options.names)]
    hybrid = ManticoreForCausalLM.from_components(specs, dtype=torch.float32, mixture="static", verify=False)
    home, other = options.names
    aligner, parts = aligner_of(hybrid), {name: hybrid.component(name) for name in options.names}
    mapping = aligner.mapping(hybrid, other)
    mapping.at_boundary()
    for name, part in parts.items():
        SHARES.watch(part, "forward", f"{name} (whole)")
        SHARES.watch(hybrid.segments.segment(name, 0).stack, "forward", f"{name}: layers")
    SHARES.watch(aligned_hybrid, "grow", "reading bytes")
    SHARES.watch(aligned_reading, "_grown", "keeping the trunk")
    SHARES.watch(aligned_hybrid.Piece, "__init__", "which tokens may follow")
    SHARES.watch(aligned_hybrid.Reading, "logits", "the component's head")
    SHARES.watch(aligned_hybrid.Piece, "__call__", "sums over both vocabularies")
    text = options.text.read_text(encoding="utf-8").encode()[: options.bytes].decode(errors="ignore")
    result = {"threads": 1, "text": options.text.stem, "names": options.names}
    rows = {}
    for name in options.names:
        reader = aligner.bytes_of(hybrid, name)
        rows[name] = torch.tensor([[*reader.start, *reader.cut(reader.prefix + text.encode())]])
    found = {"bytes": len(text.encode()), "tokens": {name: ids.shape[1] for name, ids in rows.items()}}
    hybrid.train()
    found["components"] = {}
    for name, part in parts.items():
        cpu(step(part, rows[name]))
        found["components"][name] = round(cpu(step(part, rows[name]))[0], 2)
    found["first"] = round(cpu(step(hybrid, rows[home]))[0], 2)
    seconds, shares = cpu(step(hybrid, rows[home]))
    found["hybrid"], found["ratio"] = round(seconds, 2), round(seconds / sum(found["components"].values()), 3)
    found["forward_shares"] = {label: round(value / seconds, 3) for label, value in shares.items()}
    found["nodes"] = len(aligned_reading.grow(mapping, aligned_reading.Row(), rows[home][0].tolist())[0].parents) - 1
    result["training"] = found
    keep(options.results, result)
    hybrid.zero_grad(set_to_none=True)
    hybrid.eval()
    data = text.encode()[: 2 * options.decoded].decode(errors="ignore").encode()
    found = {"bytes": 0, "components": {}, "tokens": {}}
    for name in (*options.names, "hybrid"):
        reader = aligner.bytes_of(hybrid, home if name == "hybrid" else name)
        ids = torch.tensor([[*reader.start, *reader.cut(reader.prefix + data)]])
        prompt = len(reader.start) + len(reader.cut(reader.prefix + data[: options.decoded]))
        model = hybrid if name == "hybrid" else parts[name]
        cache = hybrid.make_cache if name == "hybrid" else lambda model=model: DynamicCache(config=model.config)
        run = decode(model, ids, prompt, cache)
        first, _ = cpu(run), run.seconds
        first = run.seconds
        seconds, shares = cpu(run)
        seconds = run.seconds
        if name == "hybrid":
            found["hybrid"], found["first"] = round(seconds, 2), round(first, 2)
            found["ratio"] = round(seconds / sum(found["components"].values()), 3)
            found["shares"] = {label: round(value / seconds, 3) for label, value in shares.items()}
        else:
            found["components"][name] = round(seconds, 2)
        found["tokens"][name] = ids.shape[1] - prompt
    found["bytes"] = len(data) - options.decoded
    result["decoding"] = found
    keep(options.results, result)


def keep(path, result):
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, {**found, result["names"][0]: result})
    print(json.dumps(result), flush=True)


SHARES = Shares()

if __name__ == "__main__":
    main()
