"""Downloads a model or a data set of the Hugging Face Hub to where the configurations look for it.

    python tools/download_hf.py --repo meta-llama/Llama-3.1-8B --token hf_...
    python tools/download_hf.py --repo meta-math/MetaMathQA --repo-type dataset

Safetensors, tokenizer and configuration only: nothing that could run code. The same command goes on after an
interruption. HF_TOKEN is read where --token is not given, HF_ENDPOINT names a mirror.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from hub import PATTERNS, download

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.errors import UserError
from titan_hd.files import user_path


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--repo", required=True, help="owner/name")
    parser.add_argument("--repo-type", choices=["model", "dataset"], default="model", help="default: model")
    parser.add_argument("--revision", help="branch, tag or commit; the main branch if not given")
    parser.add_argument("--assets", nargs="+", choices=PATTERNS, help="default: all of a model, or data of a data set")
    parser.add_argument(
        "--folder", type=user_path, help="default: assets/hf/NAME for a model, assets/data/NAME for data"
    )
    parser.add_argument("--token", help="of an account that may read the repository; default: HF_TOKEN")
    args = parser.parse_args()
    is_model, name = args.repo_type == "model", args.repo.split("/")[-1]
    folder = args.folder or Path("assets", "hf" if is_model else "data", name)
    assets = args.assets or (["weights", "config", "tokenizer"] if is_model else ["data"])
    try:
        files = download(args.repo, args.repo_type, assets, folder, args.revision, args.token)
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        manager.exit_with(["the package is missing: pip install huggingface_hub, or titan_hd with its extra hub"])
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    if is_model:
        print(f"{folder}: set model.hf_assets_path to it")
    else:
        print("\n".join(f"{file}: set data.train to it" for file in files))


if __name__ == "__main__":
    main()
