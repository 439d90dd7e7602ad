"""Faults in the compiled part of it: what a signature leaves out, and whom it does not see."""

REBUILD = True
TESTS = ["tests/runtime/test_front.py"]

_FRONT = "csrc/front_module.cpp"
_SIGNATURE = "csrc/front_signature.h"

MUTANTS = [
    (_SIGNATURE, "t.requires_grad() | t.is_inference() << 1", "0 | t.is_inference() << 1"),
    (_SIGNATURE, "static_cast<int8_t>(t.scalar_type()),", "int8_t(t.element_size()),"),
    (_SIGNATURE, "  w.bytes(t.strides().data(), t.strides().size() * sizeof(int64_t));\n", ""),
    (_SIGNATURE, "  w.bytes(t.sizes().data(), t.sizes().size() * sizeof(int64_t));\n", ""),
    (_FRONT, "c10::GradMode::is_enabled() |", "0 |"),
    (_SIGNATURE, "  w.put(count);\n", ""),
    (_SIGNATURE, "w.put(value == Py_True ? 'T' : 'F')", "w.put('T')"),
    (_SIGNATURE, "w.put('f'), w.put(PyFloat_AS_DOUBLE(value))", "w.put('f'), w.put(float(0))"),
    (_SIGNATURE, "w.put('s'), w.put(size)", "w.put('s')"),
    (_FRONT, "at::impl::torch_function_mode_enabled() ||", "false ||"),
    (_FRONT, "at::hasCallbacks()", "false"),
    (_SIGNATURE, "return !t._fw_grad(0).defined();", "return true;"),
    (_SIGNATURE, "if (THPVariable_CheckExact(value))", "if (THPVariable_Check(value))"),
    (_FRONT, "!(normal().now() || inference().now()) ||", "false ||"),
    (_SIGNATURE, "full_ = full_ || size", "full_ = size"),
    (_FRONT, "dx.addmm_(dys[k], weights[k])", "dx.addmm_(dys[0], weights[k])"),
    (_SIGNATURE, "overflow == 0", "true"),
]
