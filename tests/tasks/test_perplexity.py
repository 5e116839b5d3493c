import json
import math

import pytest
import torch
from datasets import Dataset

from dynamax.tasks import Perplexity, TextExample


@pytest.mark.parametrize("total", [2, 3, 7, 8, 9, 10, 11, 12, 50, 51])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 7), (8, 1), (2, 1)])
def test_windows_score_every_token_but_the_first_once(total, window, stride):
    windows = Perplexity(window=window, stride=stride).windows(total)
    scored = [token for w in windows for token in range(w.first, w.stop)]
    assert scored == list(range(1, total))
    for w in windows:
        assert w.start < w.first < w.stop <= w.start + window  # each scored token has context


def test_windows_are_those_of_the_transformers_guide():
    total, window, stride = 2500, 1024, 512
    expected, reached = [], 0
    for start in range(0, total, stride):
        stop = min(start + window, total)
        scored = stop - reached
        reached = stop
        expected.append((start, stop, stop - scored))
        if stop == total:
            break
    expected[0] = (0, expected[0][1], 1)  # the guide's shift leaves token 0 out
    assert Perplexity().windows(total) == expected


def test_nothing_to_score():
    assert Perplexity().windows(1) == []
    assert Perplexity().windows(0) == []


def test_one_window_is_cross_entropy():
    torch.manual_seed(0)
    logits_TV, tokens_T = torch.randn(9, 5, dtype=torch.float64), torch.randint(5, (9,))
    task = Perplexity(window=16, stride=8)
    (window,) = task.windows(9)
    log_probs_TV = logits_TV.log_softmax(-1)
    total = sum(log_probs_TV[t - 1, tokens_T[t]].item() for t in range(window.first, window.stop))
    found = task.aggregate([task.score_text(TextExample("x", "x" * 30), total, window.stop - window.first)])
    expected = torch.nn.functional.cross_entropy(logits_TV[:-1], tokens_T[1:]).item()
    assert found["perplexity"] == pytest.approx(math.exp(expected))
    assert found["bits_per_byte"] == pytest.approx(expected * 8 / math.log(2) / 30)


def test_sources(tmp_path, hub):
    txt = tmp_path / "book.txt"
    txt.write_text("Über allen\r\nGipfeln", encoding="utf-8", newline="")
    assert [d.text for d in Perplexity(str(txt), characters=4).examples()] == ["Über"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": text}) for text in (" one ", "two", "three")))
    assert [d.text for d in Perplexity(str(rows), limit=2).examples()] == [" one ", "two"]
    rows.write_text('{"body": "x"}')
    with pytest.raises(ValueError, match="Row 1 of rows.jsonl has no 'text'.*among: body"):
        Perplexity(str(rows)).examples()
    hub["Salesforce/wikitext", "wikitext-2-raw-v1", "test"] = Dataset.from_dict({"text": ["", " = A = \n", "b"]})
    assert [d.text for d in Perplexity().examples()] == ["\n\n = A = \n\n\nb"]


def test_stride_must_leave_context():
    with pytest.raises(ValueError, match=r"stride=8 with window=8 .*such as 4 for a window of 8"):
        Perplexity(window=8, stride=8)
    with pytest.raises(ValueError, match="Perplexity was given stride=0"):
        Perplexity(stride=0)


def test_real_file(shared_data):
    (document,) = Perplexity(str(shared_data / "shakespeare.txt"), characters=5000).examples()
    assert len(document.text) == 5000
