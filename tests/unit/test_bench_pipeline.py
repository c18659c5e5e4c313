"""The preferences benchmark's pure parts: what a cache can have at best, by hand, and the figures."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from benchmarks.pipeline import __main__ as command
from benchmarks.pipeline.depth import deepen
from benchmarks.pipeline.figures import cache_share, figures, met, table
from benchmarks.pipeline.layout import Best, Prompt, best
from benchmarks.pipeline.trial import Trial
from benchmarks.pipeline.work import Work, evenly
from sima_ray.ports import JsonDict

IMAGE = 99


def test_a_beginning_is_cached_in_whole_blocks() -> None:
    first, second = Prompt([1, 2, 3, 4, 5, 6, 7]), Prompt([1, 2, 3, 4, 5, 6, 8])
    assert best([first], 3) == Best(7, 0)
    assert best([first, second], 3) == Best(14, 6)
    assert best([second, first], 3) == Best(14, 6)
    assert best([first, second], 8) == Best(14, 0)


def test_the_last_token_is_never_cached() -> None:
    whole = Prompt([1, 2, 3, 4])
    assert best([whole, whole], 2) == Best(8, 2)
    assert best([whole, Prompt([1, 2, 3, 4, 5])], 2) == Best(9, 4)


def test_a_block_is_the_same_only_after_the_same_blocks() -> None:
    assert best([Prompt([1, 1, 2, 2, 9]), Prompt([3, 3, 2, 2, 9])], 2) == Best(10, 0)


def test_a_block_with_an_image_is_that_images_and_so_is_what_follows() -> None:
    tokens = [1, 1, IMAGE, IMAGE, 2, 2, 3]
    one, other = Prompt(tokens, "one", IMAGE), Prompt(tokens, "other", IMAGE)
    assert best([one, other], 2) == Best(14, 2)
    assert best([one, other, one], 2) == Best(21, 8)


def repeat(seconds: float) -> dict[str, Trial]:
    ours: JsonDict = {
        "pairs": 50,
        "critic_prompt_tokens": 1000,
        "critic_cached_tokens": 495,
        "layout_tokens": 1000,
        "layout_cached": 500,
    }
    orders = {"orders_ratio": 0.7, "orders_ratio_prefill": 0.6, "orders_ratio_tokens": 0.55}
    raw = {"engine_s": 8.0, **orders}
    return {
        "ours": Trial("ours", 100, seconds, 2000, ours),
        "raw": Trial("raw", 100, 10.0, 2000, raw),
        "single": Trial("single", 10, 20.0, 200),
    }


def test_the_figures_are_ratios_of_rates_repeat_by_repeat() -> None:
    found = figures([repeat(12.5), repeat(10.0), repeat(20.0)])
    assert found["vs_raw_vllm"] == pytest.approx(0.8)
    assert found["spread"]["vs_raw_vllm"] == pytest.approx([0.5, 1.0])
    assert found["vs_raw_vllm_prepared"] == pytest.approx(0.64)
    assert found["vs_one_at_a_time"] == pytest.approx(16.0)
    assert found["cache_share"] == pytest.approx(0.99)
    assert found["rows_per_s"] == pytest.approx(8.0)
    assert found["pairs_per_s"] == pytest.approx(4.0)
    assert not found["asked"]["vs_raw_vllm"]["met"] and found["asked"]["cache_share"]["met"]
    text = table(found)
    assert "asked at least 0.85: missed" in text and "asked at least 0.98\n" in text


def test_a_bar_is_met_from_its_own_side() -> None:
    assert met("orders_ratio", 0.6) and not met("orders_ratio", 0.61)
    assert met("vs_raw_vllm", 0.85) and not met("vs_raw_vllm", 0.84)


def test_a_layout_of_other_prompts_is_refused() -> None:
    other = repeat(1.0)["ours"].more | {"layout_tokens": 999}
    with pytest.raises(ValueError, match="999"):
        cache_share(other)


def test_a_deeper_policy_answers_the_same(tiny_llava: Path, tmp_path: Path) -> None:
    deeper = deepen(tiny_llava, 5, tmp_path / "deeper")
    own, more = (AutoModelForImageTextToText.from_pretrained(f) for f in (tiny_llava, deeper))
    assert own.config.text_config.num_hidden_layers == 2
    assert more.num_parameters() > own.num_parameters()
    ids = torch.randint(10, 200, (2, 12), generator=torch.manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(own(input_ids=ids).logits, more(input_ids=ids).logits)
    with pytest.raises(ValueError, match="has 5 layers"):
        deepen(deeper, 4, tmp_path / "flatter")


@pytest.mark.parametrize("few", [1, 3, 32, 800, 1000])
def test_few_rows_are_evenly_drawn(few: int) -> None:
    drawn = evenly(range(800), few)
    assert len(set(drawn)) == min(few, 800)
    assert drawn == sorted(drawn) and sum(drawn) / len(drawn) == pytest.approx(399.5, abs=1)


def test_bare_vllms_setting_is_chosen_on_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes are best on a part, one with room for all of it on the whole."""

    def trial(name: str, work: Work, setting: JsonDict) -> Trial:
        rate = 1.0 + setting["threads"] + setting["own_process"]
        if "few" not in setting:
            rate += setting["replicas_room"]
        return Trial(name, setting.get("few", work.prompts), setting.get("few", 800) / rate, 0)

    monkeypatch.setattr(command, "_trial", trial)
    chosen = command._best_setting("raw", Work(Path(), Path(), 800, 32, 6))
    room = {"threads": 2, "own_process": True, "replicas_room": True}
    assert chosen == room | {"orders": True}
