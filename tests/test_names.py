"""The words of the field, and none of those that stood in their place: in code, docs, commands and messages."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.one_release

# What is no longer said, as a pattern, and what is said instead.
NAMES = {
    r"\bRehearsed\b": "KVzip",
    r"\bAdaptive\(": "AdaKV",
    r"(?<!\.)\bpyramid\(": "pyramid_kv",
    r"\bHeavyHitters\b": "H2O",
    r"\bFarLooks\b": "LongRangeAttention",
    r"\bHeadProfile\b": "RetrievalHeadProfile",
    r"\bmeasure_heads\b": "profile_retrieval_heads",
    r"\bSeen\b(?=[\[(,:])": "ScoringContext",
    r"\bseen\.mass\b": "seen.cumulative_attention",
    r"\baccumulates: ": "needs_cumulative_attention",
    r"\brecent=": "window_size",
    r"\bfollowing=": "n_future_positions",
    r"AdaKV\([^)]*\bfloor=": "alpha_safeguard",
    r"(?<![A-Za-z])Quantization\(": "KVQuantization",
    r"\bquantization=(KV)?Quantization": "storage=KVQuantization",
    r"\bspeakers=": "prefix_cache",
    r"\bSpeakerStats\b": "PrefixStats",
    r"\bPrompts\(": "PrefixRegistry",
    r"\bsnapshot\.fork\(": "snapshot.write_to",
    r"\bdecoding\.told\(": "teacher_forced_logits",
    r"\bwhy_not\(": "unsupported_reason",
    r"\.front\(": "first_rows",
    r"\bkv\.fit\(": "shrink_to_fit",
    r"\bmanager\.runner\b": "manager.observed_model",
    r"\.intact\(": "read_verified",
    r"\bwith_precision\b": "quantize_linear",
    r"\bquantize_linear\([^)]*\bwide=": "modules_to_not_convert",
    r"\bfew_rows\(": "onednn_linear",
    r"\brebuilt\(": "structural_copy",
    r"\bgive_back\(": "malloc_trim",
    r"\bbatch\.(turn|enter|leave)\(": "step, add, cancel",
    r"\bsays_end\b": "include_stop_token",
    r"\bforgets=": "reset_penalty_after_first",
    r"\bevents\.heard\b": "has_listeners",
    r"\btell_evicted\b": "emit_evictions",
    r"\bcount_anew\b": "reset_eviction_count",
    r"\bWanting\b": "CheckFailed",
    r"\bas_dict\b": "to_dict",
    r"\bkvcache voices\b": "kvcache prefixes",
    r"\bpreallocate=": "static",
    r"\bestimate_bytes\b": "CacheSpec.nbytes",
    r"\b(en|dis)able_kv_cache\(": "enabled",
    r"Will it fit|Where it goes|Which setting|Watching it|Beside others": "Planning memory, Profiling, Tuning, Monitoring, Comparison",
}
# A record of what was measured then; and this list.
OLD = ("benchmarks/results/", "tests/test_names.py")


def files() -> list[Path]:
    """All that is kept, but for pictures."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kinds = (".py", ".md", ".toml", ".yml", ".jinja", ".html", ".js")
    return [
        ROOT / name for name in listed if name.endswith(kinds) and not name.startswith(OLD) and (ROOT / name).is_file()
    ]


def said(text: str) -> dict[str, str]:
    """Old names that stand in a text, and what is said instead."""
    return {found[0]: new for old, new in NAMES.items() if (found := re.search(old, text))}


def test_no_old_name_is_left():
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: nothing says which files are kept")
    found = {str(file.relative_to(ROOT)): old for file in files() if (old := said(file.read_text()))}
    assert found == {}


def test_an_old_name_is_found():
    assert said("manager = KVCacheManager(model, quantization=Quantization(8), speakers=one)") == {
        "Quantization(": "KVQuantization",
        "quantization=Quantization": "storage=KVQuantization",
        "speakers=": "prefix_cache",
    }
    assert said("KVQuantization(8), RetrievalHeadProfile, self._turn.enter()") == {}
