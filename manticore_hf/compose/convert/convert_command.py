"""`manticore-hf convert`: its options."""

import argparse

from manticore_hf.utils.options import Parser


def add_options(parser: Parser) -> None:
    """Adds the command's options."""
    parser.description = (
        "Writes a checkpoint that hybrids do not read (mamba_ssm's own layout, GGUF, pickles) as a "
        "directory with safetensors and tokenizer, which they do. Pickles are read with weights_only; one that holds "
        "anything but tensors is an error. What was written is read back and compared."
    )
    parser.add_argument("source", help="directory, .gguf file or Hub repo (org/name, org/name@revision)")
    parser.add_argument("--output-dir", required=True, help="directory to write; new or empty")
    parser.add_argument(
        "--tokenizer",
        help="directory or repository of the tokenizer (default: the source's; for "
        "mamba_ssm's layout that of EleutherAI/gpt-neox-20b)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights written (default: the widest stored; for GGUF float32)",
    )
    parser.add_argument("--gguf-file", help="name of a GGUF file in the directory or repository")
    parser.add_argument("--revision", help="revision of a Hub repo")


def main(args: argparse.Namespace) -> None:
    """Converts the checkpoint and says what was made."""
    from manticore_hf.compose.convert.convert import convert

    result = convert(args.source, args.output_dir, args.tokenizer, args.dtype, args.gguf_file, args.revision)
    at = f" at commit {result['revision']}" if result["revision"] else ""
    said = f"{result['source']}{at} ({result['how']})"
    if result["how"].endswith(f" {result['source']}"):  # the source is the file that the way names
        said = result["how"]
    print(f"\nconvert: {said}")
    print(
        f"{result['model_type']}, {result['parameters']:,} parameters in {result['dtype']}, licence "
        f"{result['license'] or 'not stated'}, tokenizer {result['tokenizer']}"
    )
    if result["note"]:
        print(result["note"])
    print(f"written to {args.output_dir}; read back, it gives the same logits")
