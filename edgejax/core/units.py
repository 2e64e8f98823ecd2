"""The one place where bytes, seconds and rates become text."""


def format_bytes(n_bytes: float) -> str:
    """Bytes in binary units: ``format_bytes(98_362_432) == '93.8 MiB'``."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.{1 if value >= 10 else 2}f} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """Seconds as a person reads them: ``'0.42 s'``, ``'3 min 05 s'``, ``'1 h 02 min'``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
