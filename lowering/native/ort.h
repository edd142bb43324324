// The part of onnxruntime's C interface that a library of custom operators needs, written down by position.
//
// No package ships onnxruntime's headers, but its interface is a binary one: OrtApi is a table of functions that only
// ever grows at its end, and OrtCustomOp a struct of callbacks likewise. The positions below are those of interface
// version 20 (onnxruntime 1.20) and hold for every later one; RegisterCustomOps asks for that version and refuses a
// runtime that doesn't have it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kApiVersion = 20;

struct Status;  // null = success
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;

enum ElementType : int { kFloat = 1, kUint8 = 2, kInt64 = 7, kFloat16 = 10 };
enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

struct Api {
    void* functions[280];
};

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*version_string)();
};

template <typename Function>
struct Entry {
    std::size_t index;

    template <typename... Arguments>
    auto operator()(const Api* api, Arguments... arguments) const {
        return reinterpret_cast<Function>(api->functions[index])(arguments...);
    }
};

constexpr Entry<Status* (*)(ErrorCode, const char*)> create_status{0};
constexpr Entry<Status* (*)(const char*, Domain**)> create_domain{26};
constexpr Entry<Status* (*)(Domain*, const struct CustomOp*)> add_op{27};
constexpr Entry<Status* (*)(SessionOptions*, Domain*)> add_domain{28};
constexpr Entry<Status* (*)(Value*, void**)> tensor_data{51};
constexpr Entry<Status* (*)(const ShapeInfo*, ElementType*)> element_type{60};
constexpr Entry<Status* (*)(const ShapeInfo*, std::size_t*)> rank{61};
constexpr Entry<Status* (*)(const ShapeInfo*, int64_t*, std::size_t)> dimensions{62};
constexpr Entry<Status* (*)(const Value*, ShapeInfo**)> shape_info{65};
constexpr Entry<Status* (*)(const KernelInfo*, const char*, float*)> float_attribute{85};
constexpr Entry<Status* (*)(const KernelInfo*, const char*, int64_t*)> int_attribute{86};
constexpr Entry<Status* (*)(const KernelContext*, std::size_t, const Value**)> input{90};
constexpr Entry<Status* (*)(KernelContext*, std::size_t, const int64_t*, std::size_t, Value**)> output{91};
constexpr Entry<void (*)(Status*)> release_status{93};
constexpr Entry<void (*)(ShapeInfo*)> release_shape_info{99};
constexpr Entry<void (*)(Domain*)> release_domain{101};
constexpr Entry<Status* (*)(const KernelInfo*, std::size_t, int*, const Value**)> constant_input{249};
// fn(data, index) for each index below total, on the session's own threads; 0 = one task for each index.
constexpr Entry<Status* (*)(const KernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t, void*)>
    parallel_for{274};

// Callbacks of one operator. The runtime calls some whatever `version` says, so none is left empty but the last ones,
// which it tests; `later` keeps those of future versions null.
struct CustomOp {
    uint32_t version;
    void* (*create_v1)(const CustomOp*, const Api*, const KernelInfo*);
    const char* (*name)(const CustomOp*);
    const char* (*provider)(const CustomOp*);
    ElementType (*input_type)(const CustomOp*, std::size_t);
    std::size_t (*input_count)(const CustomOp*);
    ElementType (*output_type)(const CustomOp*, std::size_t);
    std::size_t (*output_count)(const CustomOp*);
    void (*compute_v1)(void*, KernelContext*);
    void (*destroy)(void*);
    int (*input_characteristic)(const CustomOp*, std::size_t);
    int (*output_characteristic)(const CustomOp*, std::size_t);
    int (*input_memory)(const CustomOp*, std::size_t);
    int (*variadic_input_minimum)(const CustomOp*);
    int (*variadic_input_homogeneous)(const CustomOp*);
    int (*variadic_output_minimum)(const CustomOp*);
    int (*variadic_output_homogeneous)(const CustomOp*);
    Status* (*create)(const CustomOp*, const Api*, const KernelInfo*, void**);
    Status* (*compute)(void*, KernelContext*);
    Status* (*infer_shape)(const CustomOp*, void*);
    int (*start_version)(const CustomOp*);
    int (*end_version)(const CustomOp*);
    std::size_t (*may_inplace)(int**, int**);
    void (*release_inplace)(int*, int*);
    std::size_t (*alias_map)(int**, int**);
    void (*release_alias)(int*, int*);
    void* later[16];
};

}  // namespace ort
