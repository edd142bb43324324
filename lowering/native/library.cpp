// The custom operators as onnxruntime sees them: shapes are checked, work is spread over the session's threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "attention.h"
#include "int6.h"
#include "lawcat_operator.h"
#include "layers_operators.h"
#include "operator.h"
#include "ort.h"

namespace {

constexpr char kDomain[] = "lincompile";

// ---- Int6LinearA8(x [..., K], high [N, ceil(K/2)], low [N, ceil(K/4)], scale [N, ceil(K/128)]) -> y [..., N]

const int6::Kernels* int6_kernels = nullptr;

struct Int6Linear {
    const ort::Api* api;
    const int6::Kernels& kernels = *int6_kernels;
    int6::Matrix weight{};
    bool constant = false;  // the planes are the model's own: looked up once

    Int6Linear(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        check(ort::int_attribute(api, info, "K", &weight.width));
        check(ort::int_attribute(api, info, "N", &weight.rows));
        if (weight.width < 1 || weight.rows < 1)
            fail(api, "lincompile.Int6LinearA8: K and N must be positive, got %lld and %lld",
                 static_cast<long long>(weight.width), static_cast<long long>(weight.rows));
        const ort::Value* planes[3] = {};
        constant = true;
        for (std::size_t i = 0; i < 3; i++) {
            int is_constant = 0;
            check(ort::constant_input(api, info, i + 1, &is_constant, &planes[i]));
            constant &= is_constant != 0 && planes[i] != nullptr;
        }
        if (constant) bind(weight, planes);
    }

    void bind(int6::Matrix& to, const ort::Value* const* planes) const {
        to.high = plane<uint8_t>(planes[0], "high", to.high_bytes());
        to.low = plane<uint8_t>(planes[1], "low", to.low_bytes());
        to.scale = plane<uint16_t>(planes[2], "scale", to.groups());
    }

    template <typename T>
    const T* plane(const ort::Value* value, const char* name, int64_t columns) const {
        const Shape shape = shape_of(api, value);
        if (shape.sizes != std::vector<int64_t>{weight.rows, columns})
            fail(api, "lincompile.Int6LinearA8: %s must be [%lld, %lld] for K = %lld, got %s", name,
                 static_cast<long long>(weight.rows), static_cast<long long>(columns),
                 static_cast<long long>(weight.width), shape.text().c_str());
        return data_of<const T>(api, value);
    }

    void compute(ort::KernelContext* context) const {
        const ort::Value* x = input_value(api, context, 0);
        Shape shape = shape_of(api, x);
        if (shape.sizes.empty() || shape.sizes.back() != weight.width)
            fail(api, "lincompile.Int6LinearA8: x must be [..., %lld], got %s", static_cast<long long>(weight.width),
                 shape.text().c_str());
        int64_t count = 1;
        for (std::size_t axis = 0; axis + 1 < shape.sizes.size(); axis++) count *= shape.sizes[axis];
        int6::Matrix matrix = weight;
        if (!constant) {
            const ort::Value* planes[3];
            for (std::size_t i = 0; i < 3; i++) planes[i] = input_value(api, context, i + 1);
            bind(matrix, planes);
        }
        shape.sizes.back() = matrix.rows;
        ort::Value* output = nullptr;
        check(ort::output(api, context, std::size_t{0}, static_cast<const int64_t*>(shape.sizes.data()),
                          shape.sizes.size(), &output));
        if (count == 0) return;
        const float* in = data_of<const float>(api, x);
        float* out = data_of<float>(api, output);
        int6::Tokens tokens(count, matrix.groups());
        // Rounding an input costs about as much as 16 multiplications.
        spread(api, context, count, count * matrix.width * 16,
               [&](int64_t first, int64_t last) { kernels.quantize(in, matrix.width, tokens, first, last); });
        const int64_t blocks = (matrix.rows + int6::kRowBlock - 1) / int6::kRowBlock;
        spread(api, context, blocks, count * matrix.rows * matrix.width, [&](int64_t first, int64_t last) {
            kernels.multiply(matrix, tokens, out, first * int6::kRowBlock,
                             std::min(matrix.rows, last * int6::kRowBlock));
        });
    }
};

// ---- GatedLinearAttention(query, key, value, past_state, decay) -> (output, present_state): shapes and attributes as
// com.microsoft.LinearAttention with update_rule "gated"

const attention::Kernels* attention_kernels = nullptr;

struct GatedLinearAttention {
    const ort::Api* api;
    const attention::Kernels& kernels = *attention_kernels;
    int64_t query_heads, kv_heads;
    float scale;

    GatedLinearAttention(const ort::Api* api, const ort::KernelInfo* info) : api(api) {
        check(ort::int_attribute(api, info, "q_num_heads", &query_heads));
        check(ort::int_attribute(api, info, "kv_num_heads", &kv_heads));
        check(ort::float_attribute(api, info, "scale", &scale));
        if (kv_heads < 1 || query_heads < 1 || query_heads % kv_heads != 0)
            fail(api, "lincompile.GatedLinearAttention: %lld query heads can't be divided among %lld key heads",
                 static_cast<long long>(query_heads), static_cast<long long>(kv_heads));
    }

    void expect(const Shape& shape, const char* name, const std::vector<int64_t>& wanted) const {
        if (shape.sizes != wanted)
            fail(api, "lincompile.GatedLinearAttention: %s must be %s, got %s", name, Shape{wanted}.text().c_str(),
                 shape.text().c_str());
    }

    void compute(ort::KernelContext* context) const {
        const ort::Value* given[5];
        Shape shapes[5];
        for (std::size_t i = 0; i < 5; i++) {
            given[i] = input_value(api, context, i);
            shapes[i] = shape_of(api, given[i]);
        }
        const std::vector<int64_t>&query = shapes[0].sizes, &past = shapes[3].sizes, &decay = shapes[4].sizes;
        if (query.size() != 3 || past.size() != 4 || decay.size() != 3)
            fail(api, "lincompile.GatedLinearAttention: query, past_state and decay must have 3, 4 and 3 axes, got %s, "
                 "%s and %s", shapes[0].text().c_str(), shapes[3].text().c_str(), shapes[4].text().c_str());
        attention::Call call{};
        call.batch = query[0], call.tokens = query[1];
        call.kv_heads = kv_heads, call.group = query_heads / kv_heads;
        call.keys = past[2], call.values = past[3];
        call.decay_keys = decay[2] == kv_heads ? 1 : call.keys;
        call.scale = scale;
        expect(shapes[0], "query", {call.batch, call.tokens, query_heads * call.keys});
        expect(shapes[1], "key", {call.batch, call.tokens, kv_heads * call.keys});
        expect(shapes[2], "value", {call.batch, call.tokens, kv_heads * call.values});
        expect(shapes[3], "past_state", {call.batch, kv_heads, call.keys, call.values});
        expect(shapes[4], "decay", {call.batch, call.tokens, kv_heads * call.decay_keys});
        const std::vector<int64_t> out{call.batch, call.tokens, query_heads * call.values};
        ort::Value *output = nullptr, *present = nullptr;
        check(ort::output(api, context, std::size_t{0}, static_cast<const int64_t*>(out.data()), out.size(), &output));
        check(ort::output(api, context, std::size_t{1}, static_cast<const int64_t*>(past.data()), past.size(),
                          &present));
        const float** inputs[] = {&call.query, &call.key, &call.value, &call.past, &call.decay};
        for (std::size_t i = 0; i < 5; i++) *inputs[i] = data_of<const float>(api, given[i]);
        call.output = data_of<float>(api, output);
        call.present = data_of<float>(api, present);
        if (call.tokens == 0) {
            std::copy_n(call.past, call.heads() * call.keys * call.values, call.present);
            return;
        }
        const int64_t steps = call.batch * call.tokens;
        call.factor.resize(steps * call.decay_row());
        spread(api, context, steps, steps * call.decay_row() * 16,
               [&](int64_t first, int64_t last) { kernels.exponentials(call, first, last); });
        const int64_t blocks = (call.values + attention::kColumns - 1) / attention::kColumns;
        const int64_t work = steps * kv_heads * call.keys * call.values * (2 + call.group);
        spread(api, context, call.heads() * blocks, work, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const int64_t column = i % blocks * attention::kColumns;
                kernels.columns(call, i / blocks, column, std::min(call.values, column + attention::kColumns));
            }
        });
    }
};

// ---- Registration

// The kernels that LINCOMPILE_NATIVE names; null where the choice is left to us.
const char* asked_for() {
    const char* wanted = std::getenv("LINCOMPILE_NATIVE");
    return wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "1") == 0 ? nullptr : wanted;
}

template <typename Kernel>
ort::Status* create(const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel(api, info); });
}

template <typename Kernel>
ort::Status* compute(void* kernel, ort::KernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return guarded(self.api, [&] { self.compute(context); });
}

template <typename Kernel>
void destroy(void* kernel) {
    delete static_cast<Kernel*>(kernel);
}

// An operator with float outputs; the types of its inputs are in `inputs`.
struct Op : ort::CustomOp {
    const char* op_name;
    std::vector<ort::ElementType> inputs;
    std::size_t outputs;
};

template <typename Kernel>
Op make_op(const char* name, std::vector<ort::ElementType> inputs, std::size_t outputs) {
    using ort::CustomOp;
    Op op{};
    op.op_name = name;
    op.inputs = std::move(inputs);
    op.outputs = outputs;
    op.version = ort::kApiVersion;
    op.name = [](const CustomOp* self) { return static_cast<const Op*>(self)->op_name; };
    op.provider = [](const CustomOp*) -> const char* { return nullptr; };
    op.input_type = [](const CustomOp* self, std::size_t i) { return static_cast<const Op*>(self)->inputs[i]; };
    op.input_count = [](const CustomOp* self) { return static_cast<const Op*>(self)->inputs.size(); };
    op.output_type = [](const CustomOp*, std::size_t) { return ort::kFloat; };
    op.output_count = [](const CustomOp* self) { return static_cast<const Op*>(self)->outputs; };
    op.create_v1 = [](const CustomOp*, const ort::Api*, const ort::KernelInfo*) -> void* { return nullptr; };
    op.compute_v1 = [](void*, ort::KernelContext*) {};
    op.destroy = destroy<Kernel>;
    op.input_characteristic = op.output_characteristic = [](const CustomOp*, std::size_t) { return 0; };  // required
    op.input_memory = [](const CustomOp*, std::size_t) { return 0; };
    op.variadic_input_minimum = op.variadic_output_minimum = [](const CustomOp*) { return 1; };
    op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const CustomOp*) { return 1; };
    op.create = create<Kernel>;
    op.compute = compute<Kernel>;
    op.start_version = [](const CustomOp*) { return 1; };
    op.end_version = [](const CustomOp*) { return INT32_MAX; };
    return op;
}

}  // namespace

extern "C" {

// The kernels that RegisterCustomOps registers, by name: those asked for, or by default those measured to be worth it.
// Null where this processor runs none of them.
__attribute__((visibility("default"))) const char* lincompile_kernels() {
    const char* wanted = asked_for();
    const int6::Kernels* chosen = int6::choose(wanted == nullptr ? int6::avx512vnni_name : wanted);
    if (chosen == nullptr && wanted == nullptr) chosen = int6::choose(int6::avx2_name);
    return chosen == nullptr ? nullptr : chosen->name;
}

// Adds the operators to a session's options; where there are no kernels, none: a file's function bodies then run.
__attribute__((visibility("default"))) ort::Status* RegisterCustomOps(ort::SessionOptions* options,
                                                                      const ort::ApiBase* base) {
    const ort::Api* api = base->get_api(ort::kApiVersion);
    if (api == nullptr) {
        const ort::Api* first = base->get_api(1);  // an error can be made through any version
        std::string text = std::string("lincompile's native library needs onnxruntime 1.20 or newer, this is ") +
                           base->version_string();
        return ort::create_status(first, ort::kFail, text.c_str());
    }
    return guarded(api, [&] {
        const char* name = lincompile_kernels();
        if (name == nullptr) return;
        int6_kernels = int6::choose(name);
        static const Op int6_linear =
            make_op<Int6Linear>("Int6LinearA8", {ort::kFloat, ort::kUint8, ort::kUint8, ort::kFloat16}, 1);
        attention_kernels = &attention::portable;
#if defined(__x86_64__)
        if (std::strcmp(name, int6::avx512vnni_name) == 0) attention_kernels = &attention::avx512;
#endif
        lawcat_kernels = &lawcat::portable;
        layers_kernels = &layers::portable;
#if defined(__x86_64__)
        if (std::strcmp(name, int6::avx512vnni_name) == 0)
            lawcat_kernels = &lawcat::avx512, layers_kernels = &layers::avx512;
        if (std::strcmp(name, int6::avx2_name) == 0) lawcat_kernels = &lawcat::avx2, layers_kernels = &layers::avx2;
#endif
        using Types = std::vector<ort::ElementType>;
        static const Op site = make_op<LawcatWindow>("LawcatWindow", Types(LawcatWindow::kInputs, ort::kFloat), 3);
        static const Op norm = make_op<RmsNorm<false>>(RmsNorm<false>::kName, Types(2, ort::kFloat), 1);
        static const Op add_norm = make_op<RmsNorm<true>>(RmsNorm<true>::kName, Types(3, ort::kFloat), 2);
        static const Op swiglu = make_op<SwiGlu>("SwiGlu", {ort::kFloat}, 1);
        static const Op rows = make_op<Int6Rows>("Int6Rows", {ort::kInt64, ort::kUint8, ort::kUint8, ort::kFloat16}, 1);
        static const Op gated = make_op<GatedLinearAttention>("GatedLinearAttention",
                                                              std::vector<ort::ElementType>(5, ort::kFloat), 2);
        // Lives as long as the process: sessions made from these options refer to it.
        ort::Domain* domain = nullptr;
        check(ort::create_domain(api, static_cast<const char*>(kDomain), &domain));
        check(ort::add_op(api, domain, static_cast<const ort::CustomOp*>(&int6_linear)));
        for (const Op* op : {&site, &norm, &add_norm, &swiglu, &rows})
            check(ort::add_op(api, domain, static_cast<const ort::CustomOp*>(op)));
        // The plain C++ loops are slower than onnxruntime's attention: they run where they are asked for only.
        if (attention_kernels != &attention::portable || asked_for() != nullptr)
            check(ort::add_op(api, domain, static_cast<const ort::CustomOp*>(&gated)));
        check(ort::add_domain(api, options, domain));
    });
}
}
