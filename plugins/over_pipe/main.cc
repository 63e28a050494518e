// Answers calls of the C entry that come in on standard input, until it ends. All numbers are little-endian; a text is
// its length (int32) and its bytes.
//   asked:    text op, text isa, int32 threads,
//             int32 count of attributes: text name, int32 is it a text, its text or int64
//             int32 count of inputs:     int32 dtype, int32 rank, int64 dims.., bytes
//             int32 count of outputs:    int32 dtype, int32 rank, int64 dims..
//   answered: int32 status; where it is not 0, a text; otherwise the outputs' bytes
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "dit2deploy.h"

namespace {

void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(std::feof(stdin) ? 0 : 1);
}

void write(const void* from, size_t bytes) { std::fwrite(from, 1, bytes, stdout); }

template <class T>
T number() {
    T value;
    read(&value, sizeof(value));
    return value;
}

std::string text() {
    std::string value(static_cast<size_t>(number<int32_t>()), ' ');
    read(&value[0], value.size());
    return value;
}

void answer(const std::string& value) {
    const auto length = static_cast<int32_t>(value.size());
    write(&length, sizeof(length));
    write(value.data(), value.size());
}

struct Held {
    int32_t dtype;
    std::vector<int64_t> dims;
    std::vector<char> bytes;

    d2d_tensor view() { return {dtype, static_cast<int32_t>(dims.size()), dims.data(), bytes.data()}; }
};

std::vector<Held> tensors(bool with_bytes) {
    std::vector<Held> held(static_cast<size_t>(number<int32_t>()));
    for (Held& tensor : held) {
        tensor.dtype = number<int32_t>();
        tensor.dims.resize(static_cast<size_t>(number<int32_t>()));
        size_t count = tensor.dtype == 3 ? 1 : 4;
        for (int64_t& dim : tensor.dims) count *= static_cast<size_t>(dim = number<int64_t>());
        tensor.bytes.resize(count);
        if (with_bytes) read(tensor.bytes.data(), count);
    }
    return held;
}

std::vector<d2d_tensor> views(std::vector<Held>& held) {
    std::vector<d2d_tensor> views;
    for (Held& tensor : held) views.push_back(tensor.view());
    return views;
}

void answer_one() {
    const std::string op = text(), isa = text();
    const int threads = number<int32_t>();
    std::vector<std::string> names, texts;
    std::vector<int64_t> integers;
    for (int32_t left = number<int32_t>(); left; --left) {
        names.push_back(text());
        const bool is_text = number<int32_t>();
        texts.push_back(is_text ? text() : "");
        integers.push_back(is_text ? 0 : number<int64_t>());
    }
    std::vector<d2d_attribute> attributes;
    for (size_t i = 0; i < names.size(); ++i)
        attributes.push_back({names[i].c_str(), texts[i].empty() ? nullptr : texts[i].c_str(), integers[i]});
    std::vector<Held> inputs = tensors(true), outputs = tensors(false);
    const std::vector<d2d_tensor> in = views(inputs), out = views(outputs);
    const int32_t status = d2d_run(op.c_str(), isa.c_str(), threads, 0, attributes.data(), attributes.size(),
                                   in.data(), in.size(), out.data(), out.size());
    write(&status, sizeof(status));
    if (status) return answer(d2d_last_error());
    for (const Held& tensor : outputs) write(tensor.bytes.data(), tensor.bytes.size());
}

}  // namespace

int main() {
    for (;;) {
        answer_one();
        std::fflush(stdout);
    }
}
