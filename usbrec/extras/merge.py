"""An adapter merged into its base: a Hugging Face folder that other programs load as it is.

    python -m usbrec.extras.merge --model FOLDER --adapter runs/.../rl --out MERGED

The sum W + scaling * B A is taken in fp32 and written in the dtype of W, a shard at a time. A base
that has an adapter merged into it is refused.
"""

import shutil
import tempfile
from pathlib import Path

import torch

from usbrec.extras.default_model import RECEIPT, find_model
from usbrec.llm import checkpoint
from usbrec.llm.adapter_files import CONFIG_FILE, read_adapter
from usbrec.llm.model_config import MERGED_BASE, file_in, load_config
from usbrec.options import Parser, UserError
from usbrec.parallel import run_together
from usbrec.runs import read_json, write_json

# A model's other files, which a merge does not change (ChatGLM3's own code among them).
COPIED_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".py")
NOT_COPIED = ("config.json", checkpoint.INDEX_FILE, RECEIPT)


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Write `base` with `adapter` merged into it to the new folder `out`, whole or not at all.

    Raises UserError if `out` exists, if `base` is merged already, or if the adapter does not fit.
    """
    if out.exists():
        raise UserError(f"{out} exists already: name a new folder to merge into")
    model = checkpoint.empty_decoder(load_config(base))
    settings = read_json(base / "config.json")
    if MERGED_BASE in settings:
        raise UserError(f"{base}: {settings[MERGED_BASE]} has an adapter merged into it already")
    weights = checkpoint.SafetensorsWeights.from_folder(base)
    checkpoint.parameter_names(model, weights)  # the base itself must be whole
    config, matrices = read_adapter(model, adapter)

    def merged(name: str) -> torch.Tensor:
        """Return one tensor of the base, with the adapter's part if it has one."""
        dtype, (module, _, kind) = weights.tensors[name].dtype, name.rpartition(".")
        if kind != "weight" or module not in matrices:
            return weights.load(name, dtype)
        lora_A, lora_B = matrices[module]
        return torch.addmm(weights.load(name), lora_B, lora_A, alpha=config.scaling).to(dtype)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        made = Path(work) / out.name
        sizes = {name: tensor.nbytes for name, tensor in weights.tensors.items()}
        checkpoint.write_shards(made, sizes, merged)
        trained_on = str(read_json(adapter / CONFIG_FILE).get("base_model_name_or_path"))
        write_json(made / "config.json", {**settings, MERGED_BASE: trained_on})
        for path in sorted(base.iterdir()):
            if path.suffix in COPIED_SUFFIXES and path.name not in NOT_COPIED:
                shutil.copyfile(file_in(base, path.name), made / path.name)
        made.rename(out)


def main(arguments: list[str] | None = None) -> int:
    """Merge as the flags say; a user's fault is printed as one sentence and ends with 2."""
    parser = Parser(prog="merge", description="Merge an adapter into its base model.")
    parser.add_argument("--model", required=True, help="the base: folder, GGUF file or hub name")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's folder")
    parser.add_argument("--out", type=Path, required=True, help="the new folder")

    def job() -> None:
        options = parser.parse_args(arguments)
        merge(find_model(options.model), options.adapter, options.out)
        print(f"merged into {options.out}")

    return run_together("merge", job)


if __name__ == "__main__":
    raise SystemExit(main())
