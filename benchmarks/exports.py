"""How far the exports of the committed encoder are from it, with timm too: what its card says of them.

Rewrites exports.json in the encoder's folder (--encoder); `ldae card` then puts it into the card. timm is looked for in
--peers (benchmarks/README.md says how to put it there).
"""

import argparse
import json
from pathlib import Path

from features import find_timm

from ldae_hf import LDAEModel
from ldae_hf.export import parity, parity_text
from ldae_hf.manifest import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=Path("model_cards/ldae-cifar10"))
    parser.add_argument("--peers", type=Path, default=Path(".venv-peers"), help="folder of timm and torchvision")
    args = parser.parse_args()
    if reason := find_timm(args.peers):
        print(reason)
    rows = parity(LDAEModel.from_pretrained(args.encoder))
    write_text(args.encoder / "exports.json", json.dumps(rows, indent=2) + "\n")
    print(parity_text(rows))


if __name__ == "__main__":
    main()
