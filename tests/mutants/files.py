"""Faults in adapter files: what is read, what is refused, how a save becomes one step."""

TESTS = ["tests/hf/test_files.py", "tests/hf/test_files_fuzz.py", "-m", "not slow"]

_FILES = "petal_kernels/hf/files.py"
_ATTACH = "petal_kernels/hf/attach.py"

MUTANTS = [
    (_FILES, "if hashlib.sha256(data).hexdigest() == digest:", "if True:"),
    (_FILES, "if values.get(_SEAL, want) != want:", "if False:"),
    (_FILES, "if values.get(_SEAL, want) != want:", "if values.get(_SEAL) != want:"),
    (_FILES, "if got[name].shape != tensor.shape:", "if False:"),
    (_FILES, "return got in FLOATING and torch.promote", "return torch.promote"),
    (_FILES, "    if missing or unexpected:", "    if missing:"),
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
    (_FILES, "except (SafetensorError, KeyError,", "except (KeyError,"),
    # The order of a save.
    (
        _FILES,
        "        os.replace(tensors_file, pending)",
        "        os.replace(tensors_file, folder / TENSORS)",
    ),
    (
        _FILES,
        "for candidate in (path, _pending(folder, digest), path):",
        "for candidate in (path,):",
    ),
    (_FILES, "mark = uuid.uuid4().hex", "mark = os.getpid()"),
    (
        _FILES,
        "        return False\n    except OSError:",
        "        return True\n    except OSError:",
    ),
    (_FILES, "            if _bytes(path) == text:\n                raise", "            raise"),
    (_FILES, "        tensors_file.unlink(missing_ok=True)", "        pass"),
    (_FILES, "            pending.unlink(missing_ok=True)", "            pass"),
    (_FILES, "        if not config.is_file() or config.read_bytes() != text:", "        if True:"),
    (_FILES, "if time.time() - path.stat().st_mtime > _STALE:", "if True:"),
    (_FILES, "if time.time() - path.stat().st_mtime > _STALE:", "if False:"),
    # A model that is left as it was.
    (_ATTACH, '        if attachment.__dict__.get("_attached"):', "        if False:"),
    (_ATTACH, "        attachment.detach()\n        raise", "        raise"),
    (_ATTACH, "    config = dataclasses.replace(config)\n", ""),
    (_ATTACH, "        saved.check_base(attachment.signature())\n", ""),
]
