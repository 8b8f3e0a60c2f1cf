"""`transformers serve` with a hybrid, under load: are its answers those of offline generation, and what does it cost?

    manticore-hf compose manticore_hf/demo_components/neox-prose manticore_hf/demo_components/mamba-code \
        --output_dir hybrid
    python benchmarks/serving.py hybrid --output benchmarks/results/serving.json

Starts the server of the installed Transformers on loopback, as a user would, with the hybrid's own remote code, and
sends requests of mixed lengths (prompts and answers), several at a time: text completions and chats, half of them
streamed. Every answer is compared with greedy `generate` of the same prompt alone, in this process. Then the same
prompts are generated offline in padded batches, which the server does not do, and those are compared, too. Ends after
`--requests` requests or `--seconds` seconds for each number of clients.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


class Server:
    """A `transformers serve` process on loopback, ended with the `with` block.

    Args:
        folder: Where its log goes.
        *arguments: Further options of the command.
    """

    def __init__(self, folder, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log = Path(folder) / "serve.log"
        self.command = [
            sys.executable, "-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port",
            str(self.port), "--device", "cpu", "--trust-remote-code", *arguments,
        ]  # fmt: skip

    def __enter__(self):
        with open(self.log, "w") as log:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(self.command, **pipes)
        end = time.monotonic() + 300
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-3000:]}") from None
                time.sleep(0.2)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def post(self, path, **body):
        """The answer to a request, or the chunks of a streamed one, as a list of objects."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = answer.read().decode()
        if not body.get("stream"):
            return [json.loads(text)]
        parts = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
        if any("error" in part for part in parts):
            raise RuntimeError(f"The server answered {parts[-1]}")
        return parts

    def ask(self, model, prompt, tokens, chat=False, stream=False):
        """The greedy answer to a prompt: its text, or the chunks' texts joined."""
        settings = {"model": str(model), "temperature": 0, "max_tokens": tokens, "stream": stream}
        if not chat:
            parts = self.post("completions", prompt=prompt, **settings)
            return "".join(part["choices"][0].get("text", "") for part in parts)
        parts = self.post("chat/completions", messages=[{"role": "user", "content": prompt}], **settings)
        return "".join(part["choices"][0]["delta" if stream else "message"].get("content", "") for part in parts)


def encode(tokenizer, prompt, chat):
    """Token ids of a prompt, as the server makes them."""
    if chat:
        messages = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return tokenizer(prompt)["input_ids"]


def offline(model, tokenizer, prompt, tokens, chat=False):
    """What the server should answer: greedy generation of one prompt alone."""
    ids = torch.tensor([encode(tokenizer, prompt, chat)], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def mixed(words, count, seed, longest=60):
    """Requests: (prompt of 1 to `longest` words, tokens of the answer, chat, stream)."""
    draw = random.Random(seed)
    for i in range(count):
        prompt = " ".join(draw.choices(words, k=draw.choice([1, 3, 10, longest // 2, longest])))
        yield prompt, draw.choice([1, 4, 12, 24]), i % 2 == 1, i // 2 % 2 == 1


def load(server, model, requests, wanted, clients, seconds):
    """Sends the requests from several clients; returns what came of it."""
    end, times = time.monotonic() + seconds, []

    def one(job):
        (prompt, tokens, chat, stream), expected = job
        if time.monotonic() > end:
            return None
        start = time.monotonic()
        answer = server.ask(model, prompt, tokens, chat, stream)
        times.append(time.monotonic() - start)
        return answer == expected

    start = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        right = [found for found in pool.map(one, zip(requests, wanted)) if found is not None]
    took = time.monotonic() - start
    asked = sum(request[1] for request in requests[: len(right)])
    return {
        "clients": clients,
        "requests": len(right),
        "wrong": right.count(False),
        "seconds": round(took, 2),
        "tokens_per_second": round(asked / took, 1),
        "median_latency": round(statistics.median(times), 3),
        "p95_latency": round(sorted(times)[int(0.95 * (len(times) - 1))], 3),
    }


def one_at_a_time(model, tokenizer, requests):
    """Offline answers, and what they took."""
    start = time.monotonic()
    answers = [offline(model, tokenizer, *request[:3]) for request in requests]
    took = time.monotonic() - start
    asked = sum(request[1] for request in requests)
    return answers, {"seconds": round(took, 2), "tokens_per_second": round(asked / took, 1)}


def batched(model, tokenizer, requests, wanted, size):
    """The same requests offline, in batches padded on the left; each batch as long as its longest answer."""
    wrong, start = 0, time.monotonic()
    for i in range(0, len(requests), size):
        rows = requests[i : i + size]
        ids = [encode(tokenizer, prompt, chat) for prompt, _, chat, _ in rows]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(model.device)
        new = model.generate(**inputs, max_new_tokens=max(row[1] for row in rows), do_sample=False)
        new = new[:, inputs["input_ids"].shape[1] :]
        for row, out, expected in zip(rows, new, wanted[i : i + size]):
            wrong += tokenizer.decode(out[: row[1]], skip_special_tokens=True) != expected
    took = time.monotonic() - start
    asked = sum(row[1] for row in requests)
    return {"batch": size, "wrong": wrong, "seconds": round(took, 2), "tokens_per_second": round(asked / took, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="Directory or repository of a hybrid with its tokenizer")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--seconds", type=float, default=120, help="At most, for each number of clients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    # The server takes the tokenizer from the same place, so the template has to be there
    tokenizer.chat_template = tokenizer.chat_template or CHAT
    with tempfile.TemporaryDirectory(prefix="manticore-serving-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        words = [text for text in (tokenizer.decode([i]).strip() for i in range(len(tokenizer))) if text.isalpha()]
        requests = list(mixed(words, args.requests, args.seed))
        wanted, before = one_at_a_time(model, tokenizer, requests)
        print(f"Offline, one at a time: {before}", flush=True)
        rows = []
        with Server(folder) as server:
            server.ask(folder, requests[0][0], 1)  # loads the model
            for clients in args.clients:
                rows.append(load(server, folder, requests, wanted, clients, args.seconds))
                print(rows[-1], flush=True)
        again, after = one_at_a_time(model, tokenizer, requests)
        result = {
            "offline_before_and_after": [before, after],  # how much the machine's load changed meanwhile
            "served": rows,
            "offline_batched": [batched(model, tokenizer, requests, wanted, size) for size in (4, 16)],
            "components": list(model.config.component_names),
            "parameters": model.num_parameters(),
            "seed": args.seed,
        }
    print(result["offline_batched"])
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    wrong = sum(row["wrong"] for row in (*rows, *result["offline_batched"])) + (again != wanted)
    print(f"{sum(row['requests'] for row in rows)} answers served, {wrong} wrong.")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
