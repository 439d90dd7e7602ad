"""Faults in the compiled part of it: what a signature leaves out, and whom it does not see."""

REBUILD = True
TESTS = ["tests/runtime/test_front.py"]

_FRONT = "csrc/front_module.cpp"

MUTANTS = [
    (_FRONT, "t.requires_grad() | t.is_inference() << 1", "0 | t.is_inference() << 1"),
    (_FRONT, "static_cast<int8_t>(t.scalar_type()),", "int8_t(t.element_size()),"),
    (_FRONT, "  w.bytes(t.strides().data(), t.strides().size() * sizeof(int64_t));\n", ""),
    (_FRONT, "  w.bytes(t.sizes().data(), t.sizes().size() * sizeof(int64_t));\n", ""),
    (
        _FRONT,
        "                         static_cast<int8_t>(t.dim())};",
        "                         0};",
    ),
    (_FRONT, "c10::GradMode::is_enabled() |", "0 |"),
    (_FRONT, "  w.put(count);\n", ""),
    (_FRONT, "w.put(value == Py_True ? 'T' : 'F')", "w.put('T')"),
    (_FRONT, "w.put('f'), w.put(PyFloat_AS_DOUBLE(value))", "w.put('f'), w.put(float(0))"),
    (_FRONT, "w.put('s'), w.put(size)", "w.put('s')"),
    (_FRONT, "at::impl::torch_function_mode_enabled() ||", "false ||"),
    (_FRONT, "at::hasCallbacks()", "false"),
    (_FRONT, "return !t._fw_grad(0).defined();", "return true;"),
    (_FRONT, "if (THPVariable_CheckExact(value))", "if (THPVariable_Check(value))"),
    (_FRONT, "!(normal().now() || inference().now()) ||", "false ||"),
    (_FRONT, "full_ = full_ || size", "full_ = size"),
    (_FRONT, "dx.addmm_(dys[k], weights[k])", "dx.addmm_(dys[0], weights[k])"),
    (_FRONT, "overflow == 0", "true"),
]
