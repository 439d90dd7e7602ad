"""Faults in what a call says of its tokens, in a dropped mask, and in names of places."""

TESTS = [
    "tests/hf/test_config.py",
    "tests/hf/test_dropped_mask.py",
    "tests/hf/test_expert_routing.py",
    "tests/hf/test_experts.py",
    "tests/hf/test_insertion.py",
    "tests/hf/test_insertion_places.py",
    "tests/hf/test_packed.py",
    "tests/hf/test_tokens.py",
    "tests/hf/test_walk.py",
    "-m",
    "not slow",
]

_TOKENS = "petal_kernels/hf/tokens.py"
_DROPPED = "petal_kernels/hf/dropped_mask.py"
_WALK = "petal_kernels/hf/walk.py"
_CONFIG = "petal_kernels/hf/config.py"

MUTANTS = [
    (
        _TOKENS,
        "repeat_interleave(rows // samples, dim=0)",
        "repeat(rows // samples, *[1] * (given.dim() - 1))",
    ),
    (_TOKENS, "0 < known <= self.past", "0 < known < self.past"),
    (_TOKENS, "self.encoded_mask if encoded else self.mask", "self.mask"),
    (_TOKENS, "mask[:, past : past + length]", "mask[:, mask.shape[1] - length :]"),
    (_TOKENS, "if mask.shape[1] < past + length:", "if False:"),
    (_TOKENS, "start: int | Tensor = past.to(mask.device).clamp(max=last)", "start = last"),
    (_TOKENS, "start = min(past, last)", "start = last"),
    (_TOKENS, "start = min(past, last)", "start = past"),
    (_TOKENS, "return _columns(mask, past, length, 0)", "return mask[:, -length:]"),
    (_TOKENS, "        if queries > 1:\n", "        if False:\n"),
    (_TOKENS, "        if seen.shape[1] > 1:\n", "        if False:\n"),
    (_TOKENS, "torch.where(real, index, -1)", "index.expand_as(real)"),
    (_TOKENS, "real[:, 1:] & (latest >= 0) & ~sees", "(latest >= 0) & ~sees"),
    (_TOKENS, "real[:, 1:] & (latest >= 0) & ~sees", "real[:, 1:] & ~sees"),
    (_TOKENS, "if mask is not None or not isinstance(positions", "if not isinstance(positions"),
    (_TOKENS, "ends.numel() - 1 > self.rows", "ends.numel() > self.rows"),
    (_TOKENS, "return past.clone()", "return past"),
    (_TOKENS, "if length == 1 or torch", "if True or torch"),
    (_TOKENS, "front + given.shape[1]", "given.shape[1]"),
    (_TOKENS, 'part == "all" and length != self.length', "False"),
    (_TOKENS, '    if part == "first":', '    if part == "none":'),
    (_TOKENS, "of_tokens[:, of_tokens.shape[1] - length :]", "of_tokens[:, :length]"),
    (_TOKENS, "if encoded and self.reads_image:", "if False:"),
    (_TOKENS, "behind_encoder=crosses and not first,", "behind_encoder=crosses,"),
    (_TOKENS, "return _part(mask, length, part)", 'return _part(mask, length, "last")'),
    (_DROPPED, "            self.looks = 0\n", ""),
    (_DROPPED, "        self.looks -= 1\n", ""),
    (_DROPPED, "if bool(hidden.any()):", "if True:"),
    (_WALK, "re.fullmatch(wanted, site.path)", "re.search(wanted, site.path)"),
    (_WALK, 'endswith("." + name)', "endswith(name)"),
    (_CONFIG, '"aurora_release" if self.variant == "release" else "blocks"', '"blocks"'),
]
