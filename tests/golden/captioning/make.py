"""Score the captions of pycocoevalcap.json anew with pycocoevalcap and Java; see README.md."""

import contextlib
import json
import sys
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import my_lcs
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

sys.path.insert(0, str(Path(__file__).parents[3] / "pathflip_jax" / "scores"))
from words import words  # noqa: E402 - the file alone: it needs no other package


def f1(predicted: list[str], reference: list[str]) -> float:
    """The F1 of the longest common subsequence."""
    return 2 * my_lcs(reference, predicted) / (len(predicted) + len(reference)) if predicted else 0.0


def main() -> None:
    """Print the file."""
    captions = json.loads((Path(__file__).parent / "pycocoevalcap.json").read_text())["captions"]
    said = {i: [" ".join(words(row["prediction"]))] for i, row in enumerate(captions)}
    wanted = {i: [" ".join(words(text)) for text in row["references"]] for i, row in enumerate(captions)}
    with contextlib.redirect_stdout(sys.stderr):
        bleu, _ = Bleu(4).compute_score(wanted, said, verbose=0)
        _, cider = Cider().compute_score(wanted, said)
        rouge = [max(f1(said[i][0].split(), text.split()) for text in wanted[i]) for i in said]
        texts = [text for row in captions for text in (row["prediction"], *row["references"]) if text]
        tokens = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    scores = {"BLEU": [float(b) for b in bleu], "ROUGE-L": rouge, "CIDEr": [float(c) for c in cider]}
    ptb = [{"text": text, "tokens": tokens[i][0].split()} for i, text in enumerate(texts)]
    print(json.dumps({"made_by": "pycocoevalcap 1.2", "captions": captions, "scores": scores, "ptb": ptb}, indent=1))


if __name__ == "__main__":
    main()
