"""Files as pytest-benchmark writes them, of made-up measurements."""

import json


def benchmark(file, shape="llava-576-144-b1", mode="step-frozen", provider="eager", **info):
    """As pytest-benchmark writes it."""
    given = {"shape": "[1, 2, 3] -> [1, 1, 3]", "dtype": "torch.float32", "device": "a CPU", **info}
    return {
        "group": f"{shape} {mode}" + ", bytes kept" * (file == "saved_bytes"),
        "name": f"test_{file}[{shape}-{mode}-{provider}]",
        "params": {"provider": provider},
        "extra_info": given,
        "options": {"timer": "perf_counter"},
        "stats": {"min": 0.1, "median": 0.2, "max": 0.3, "rounds": 3, "data": [0.1, 0.2, 0.3]},
    }


def timed(ratio=1.25, peak=None, **which):
    rates = {"gigabytes_per_second": 2.0, "teraflop_per_second": 0.1, "peak_memory_bytes": None}
    peaks = {
        "percent_of_roofline": peak and 12.3,
        "peak_teraflop_per_second": peak,
        "peak_gigabytes_per_second": peak,
    }
    ratios = {"ratio_to_eager": ratio, "ratio_range": [ratio - 0.123456, ratio + 0.1]}
    times = {"milliseconds": 10.0 * ratio, "eager_milliseconds": 10.0}
    return benchmark("speed", **ratios, **times, **rates, **peaks, **which)


def kept(saved=50, **which):
    return benchmark("saved_bytes", saved_bytes=saved, eager_saved_bytes=100, **which)


def measured(tmp_path, *benchmarks):
    """The words of a step that leaves these."""
    source = tmp_path / "source.json"
    text = json.dumps({"machine_info": {"node": "myhost"}, "benchmarks": benchmarks})
    source.write_text(text)
    return "measure", str(source)
