"""Faults in adapter files: what is read, what is refused, how a save becomes one step."""

TESTS = [
    *("tests/hf/test_files.py", "tests/hf/test_files_fuzz.py", "tests/hf/test_names.py"),
    "tests/hf/test_saves.py",
    *("tests/hf/test_sharded.py", "-m", "not slow"),
]

_FILES = "petal_kernels/hf/files.py"
_NAMES = "petal_kernels/hf/names.py"
_PAIR = "petal_kernels/hf/pair.py"
_TENSORS = "petal_kernels/hf/tensors.py"
_ATTACH = "petal_kernels/hf/attach.py"

MUTANTS = [
    (_FILES, "if hashlib.sha256(data).hexdigest() == digest:", "if True:"),
    (_FILES, "if values.get(_SEAL, want) != want:", "if False:"),
    (_FILES, "if values.get(_SEAL, want) != want:", "if values.get(_SEAL) != want:"),
    (_TENSORS, "if got[name].shape != tensor.shape:", "if False:"),
    (_TENSORS, "return got in FLOATING and torch.promote", "return torch.promote"),
    (_TENSORS, "    if missing or unexpected:", "    if missing:"),
    (_FILES, "if type(version) is not int or version != FORMAT_VERSION:", "if False:"),
    (_FILES, "    if unknown:", "    if False:"),
    (_FILES, "    if len(values) != len(pairs):", "    if False:"),
    (_FILES, "parse_constant=_no_constant", "parse_constant=None"),
    (_FILES, "except (ValueError, RecursionError) as error:", "except ValueError as error:"),
    (
        _FILES,
        'if not isinstance(values["method"], str) or values["method"] not in METHODS:',
        'if values["method"] not in METHODS:',
    ),
    (_FILES, "    if not path.is_file():", "    if False:"),
    (_PAIR, "            if path.is_file():", "            if True:"),
    (_FILES, "old if is_ours(old) else None", "old"),
    (_FILES, "old if is_ours(old) else None", "None"),
    (_FILES, "except (SafetensorError, KeyError,", "except (KeyError,"),
    # The order of a save.
    (
        _PAIR,
        "        os.replace(tensors_file, waiting)",
        "        os.replace(tensors_file, folder / TENSORS)",
    ),
    (
        _FILES,
        "for candidate in (path, pair.pending(path.parent, digest), path):",
        "for candidate in (path,):",
    ),
    (_PAIR, "mark = uuid.uuid4().hex", "mark = os.getpid()"),
    (
        _PAIR,
        "        return False\n    except OSError:",
        "        return True\n    except OSError:",
    ),
    (
        _FILES,
        "            if pair.json_of(folder) == found:\n                raise",
        "            raise",
    ),
    (_PAIR, "        tensors_file.unlink(missing_ok=True)", "        pass"),
    (_PAIR, "            waiting.unlink(missing_ok=True)", "            pass"),
    (_PAIR, "        if not _is_named(folder, digest):", "        if True:"),
    (_PAIR, "for name in (CONFIG, OLD_CONFIG):", "for name in (CONFIG,):"),
    (_PAIR, "for name in (CONFIG, OLD_CONFIG, CONFIG):", "for name in (CONFIG, OLD_CONFIG):"),
    (_PAIR, "for name in (CONFIG, OLD_CONFIG, CONFIG):", "for name in (OLD_CONFIG, CONFIG):"),
    (_PAIR, "if time.time() - path.stat().st_mtime > _STALE:", "if True:"),
    (_PAIR, "if time.time() - path.stat().st_mtime > _STALE:", "if False:"),
    # What an engine sharded, and where a module stands.
    (_TENSORS, "if not tensor.numel() or (want is not None", "if (want is not None"),
    (_TENSORS, "or (want is not None and tensor.shape != want):", ":"),
    (_TENSORS, "        if tensor.is_meta:", "        if False:"),
    (_TENSORS, "        if not torch.distributed.is_initialized():", "        if False:"),
    (_TENSORS, "    if lost:", "    if False:"),
    (
        _TENSORS,
        "(_part_of(whole[name], tensor) if is_sharded(tensor) else whole[name])",
        "(whole[name])",
    ),
    (_TENSORS, "    if len(str(names)) <= _SHOWN:", "    if True:"),
    (_TENSORS, "name.removeprefix(head)", "name"),
    (_NAMES, "if part not in WRAPPERS]", "]"),
    (_NAMES, "sorted(prefixes, key=len, reverse=True)", "prefixes"),
    (_NAMES, "if len(olds) == 1 and", "if"),
    (_ATTACH, "        made.installed.shapes.update(tensors.shapes_of(made.state_dict()))\n", ""),
    # A model that is left as it was.
    (_ATTACH, "BaseException:\n        made.detach()\n", "BaseException:\n"),
    (_ATTACH, "        saved.check_base(made.signature())\n", ""),
]
