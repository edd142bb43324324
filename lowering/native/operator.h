// What every operator needs: errors, tensors, and the session's threads. Included by library.cpp only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <new>
#include <string>
#include <vector>

#include "ort.h"

namespace {

constexpr int64_t kWorkPerTask = 1 << 17;  // multiplications; less isn't worth waking a thread for
constexpr int64_t kMaxTasks = 16;

// ---- Errors: a status of the runtime's, thrown up to the callback that may return it.

struct Failure {
    ort::Status* status;
};

[[noreturn]] void fail(const ort::Api* api, const char* format, ...) {
    char text[400];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw Failure{ort::create_status(api, ort::kInvalidArgument, static_cast<const char*>(text))};
}

void check(ort::Status* status) {
    if (status != nullptr) throw Failure{status};
}

template <typename Body>
ort::Status* guarded(const ort::Api* api, Body body) {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception& error) {
        return ort::create_status(api, ort::kFail, error.what());
    }
}

// ---- Tensors

struct Shape {
    std::vector<int64_t> sizes;

    std::string text() const {
        std::string out = "[";
        for (std::size_t i = 0; i < sizes.size(); i++) out += (i ? ", " : "") + std::to_string(sizes[i]);
        return out + "]";
    }
};

const ort::Value* input_value(const ort::Api* api, ort::KernelContext* context, std::size_t index) {
    const ort::Value* value = nullptr;
    check(ort::input(api, static_cast<const ort::KernelContext*>(context), index, &value));
    if (value == nullptr) fail(api, "lincompile: input %zu is missing", index);
    return value;
}

Shape shape_of(const ort::Api* api, const ort::Value* value) {
    ort::ShapeInfo* info = nullptr;
    check(ort::shape_info(api, value, &info));
    std::size_t rank = 0;
    Shape shape;
    ort::Status* status = ort::rank(api, static_cast<const ort::ShapeInfo*>(info), &rank);
    if (status == nullptr) {
        shape.sizes.resize(rank);
        status = ort::dimensions(api, static_cast<const ort::ShapeInfo*>(info), shape.sizes.data(), rank);
    }
    ort::release_shape_info(api, info);
    check(status);
    return shape;
}

template <typename T>
T* data_of(const ort::Api* api, const ort::Value* value) {
    void* data = nullptr;
    check(ort::tensor_data(api, const_cast<ort::Value*>(value), &data));
    return static_cast<T*>(data);
}

// ---- Threads

template <typename Body>
struct Job {
    Body body;
    int64_t count, tasks;
    std::atomic<bool> failed{false};

    static void run(void* self, std::size_t index) {
        Job& job = *static_cast<Job*>(self);
        const int64_t task = static_cast<int64_t>(index);
        try {
            job.body(job.count * task / job.tasks, job.count * (task + 1) / job.tasks);
        } catch (...) {  // only memory can run out here; nothing may be thrown through the runtime's threads
            job.failed = true;
        }
    }
};

// body(first, last) over parts of `count` items that cost `work` multiplications in all.
template <typename Body>
void spread(const ort::Api* api, ort::KernelContext* context, int64_t count, int64_t work, Body body) {
    const int64_t tasks = std::max<int64_t>(1, std::min({count, kMaxTasks, work / kWorkPerTask}));
    if (tasks == 1) return body(0, count);
    Job<Body> job{body, count, tasks};
    check(ort::parallel_for(api, static_cast<const ort::KernelContext*>(context), &Job<Body>::run,
                            static_cast<std::size_t>(tasks), std::size_t{0}, static_cast<void*>(&job)));
    if (job.failed) throw std::bad_alloc();
}

}  // namespace
