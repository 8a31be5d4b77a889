"""The evaluator of record: load a compressed image classifier, verify it, measure it, score it.

    python model_loader.py --submission_dir DIR --data_dir DIR --baseline_size 50 --baseline_latency 10 \
        --baseline_accuracy 80 --output_file results.json

This file is the evaluator's face. Its parts are in `compress/evaluation/`, on top of `architectures/`, two files of
`loaders/` and `metadata/`. The `model_loader.py` in a submission is those parts joined into one file by
`python -m compress bundle`. A submission is data: the evaluator executes nothing in it. With `--allow_code` it runs code
in a separate process.
"""

from __future__ import annotations

import sys
from pathlib import Path

HOME = Path(__file__).resolve().parent
if str(HOME) not in sys.path:  # `python -I`, or loaded by path
    sys.path.insert(0, str(HOME))

try:
    from compress.evaluation.command import main
    from compress.evaluation.evaluate import evaluate_submission
    from compress.evaluation.runtimes import load_model
    from loaders.images import decode_image
    from metadata.schemas import Preprocessing
except ModuleNotFoundError as error:
    if str(error.name).split(".")[0] not in ("architectures", "compress", "loaders", "metadata"):
        raise
    ALONE = (f"{Path(__file__).name} is the toolkit's own and needs the folders beside it ({error.name} was not found); "
             "write a file that stands alone with `python -m compress bundle --out FILE`")
    if __name__ != "__main__":
        raise ImportError(ALONE) from error
    print(f"error: {ALONE}", file=sys.stderr)
    sys.exit(2)

__all__ = ["Preprocessing", "decode_image", "evaluate_submission", "load_model", "main"]

if __name__ == "__main__":
    sys.exit(main())
