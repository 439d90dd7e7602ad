"""Faults in the compiled part of it: what a signature leaves out, and whom it does not see."""

REBUILD = True
TESTS = [f"tests/runtime/test_{name}.py" for name in ("front", "front_prepared", "front_nodes")]

_FRONT = "csrc/front_module.cpp"
_SIGNATURE = "csrc/common/front/signature.h"
_PREPARED = "csrc/common/front/prepared.h"
_NODE = "csrc/common/front/node.h"
_KERNELS = "csrc/lowrank_linear/front/kernels.h"
_LINEAR = "csrc/lowrank_linear/front/call.h"
_MLP = "csrc/gated_mlp/front/call.h"

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
    (_PREPARED, "at::impl::torch_function_mode_enabled() ||", "false ||"),
    (_PREPARED, "at::hasCallbacks()", "false"),
    (_SIGNATURE, "return !t._fw_grad(0).defined();", "return true;"),
    (_SIGNATURE, "if (THPVariable_CheckExact(value))", "if (THPVariable_Check(value))"),
    (_PREPARED, "!(normal().now() || inference().now()) ||", "false ||"),
    (_SIGNATURE, "full_ = full_ || size", "full_ = size"),
    (_FRONT, "dx.addmm_(dys[k], weights[k])", "dx.addmm_(dys[0], weights[k])"),
    (_SIGNATURE, "overflow == 0", "true"),
    # Whom a node lets pass, and what it hands on.
    (_NODE, "watched() || c10::GradMode::is_enabled();", "watched();"),
    (_NODE, "bool seen = watched() ||", "bool seen ="),
    (_NODE, "(t.defined() && !plain(t))", "false"),
    (_PREPARED, "random64() % (1ULL << 62)", "random64() % (1ULL << 61)"),
    (_PREPARED, 'PyObject_HasAttrString(object.get(), "petal_recipe")', "false"),
    (_PREPARED, "return flat.stride(-1) == 1 ||", "return true ||"),
    (_PREPARED, "if (dropout == 0.0) return std::nullopt;", ""),
    (_KERNELS, "if (k > 0) out.x->addmm_(dys[k], p.weights[k]);", ""),
    (_KERNELS, "const bool joined = !s.apart &&", "const bool joined ="),
    (_KERNELS, "need.x && !by_library ? list", "need.x ? list"),
    (_LINEAR, "any_trained(t.p.downs) ? t.x : at::Tensor()", "t.x"),
    (_LINEAR, "needs.any(1, ups)", "true"),
    (_LINEAR, "out[next] = rows[k].sum(0);", "out[next] = rows[0].sum(0);"),
    (_LINEAR, "if (recorded && is_offered(t.x)) Py_RETURN_NONE;", ""),
    (_MLP, "static_cast<int64_t>(linears() - 1);", "1;"),
    (_MLP, "const bool between = any_trained(before) ||", "const bool between = true ||"),
    (_MLP, "any = any || bias(k);", ""),
    (_MLP, "out[n.bias_at[k]] = inner[k].sum(0);", "out[n.bias_at[k]] = inner[0].sum(0);"),
    (_MLP, "trained ? behind : std::nullopt,", "trained ? kept.rng : std::nullopt,"),
]
