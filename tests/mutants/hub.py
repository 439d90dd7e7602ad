"""Faults in what goes to the Hub and what is fetched from it."""

TESTS = ["tests/hf/test_hub.py"]

_HUB = "petal_kernels/hf/hub.py"

MUTANTS = [
    (_HUB, "and not os.path.exists(name)", ""),
    (_HUB, "bool(_REPO.fullmatch(name))", "True"),
    (_HUB, "snapshot_download(repo, allow_patterns=list(FILES))", "snapshot_download(repo)"),
    (_HUB, "except (OSError, ValueError) as error:", "except ValueError as error:"),
    (_HUB, "if not isinstance(repo, str) or not _REPO.fullmatch(repo):", "if False:"),
    (_HUB, "attachment.save(folder, format=format)", "attachment.save(folder)"),
    (_HUB, "private=private, exist_ok=True", "exist_ok=True"),
    (_HUB, "api = HfApi(token=token)", "api = HfApi()"),
    (_HUB, 'create_pr=options.get("create_pr", False)', "create_pr=False"),
    (_HUB, "isinstance(base, str) and is_repo(base)", "isinstance(base, str)"),
    (_HUB, 'front += [f"base_model: {base}"] if known else []', "pass"),
    (
        _HUB,
        'library = "peft" if format == "peft" else "petal_kernels"',
        'library = "petal_kernels"',
    ),
]
