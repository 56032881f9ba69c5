// Multiplies the matrices of a file and writes the products to another: the CPU kernels as a program
// of its own, for an emulator of a processor that is not here. test_arm.py writes the file.

#include <cstdio>
#include <cstring>
#include <vector>

#include "../../../qmix/kernels/cpu/csrc/kernels.cpp"

struct Reader {
    const char* at;
    template <class T>
    T number() {
        T value;
        memcpy(&value, at, sizeof value);
        at += sizeof value;
        return value;
    }
    // A block of memory of its own, so that a read past its end would be found; null if empty.
    void* block() {
        const int64_t bytes = number<int64_t>();
        if (!bytes) return nullptr;
        void* copy = malloc(size_t(bytes));
        memcpy(copy, at, size_t(bytes));
        at += bytes;
        return copy;
    }
    GroupValues values() {
        GroupValues array{};
        array.values = block(), array.outer = block();
        array.map = static_cast<const float*>(block());
        array.block = number<int64_t>();
        array.start = number<float>(), array.step = number<float>();
        array.offset = number<float>();
        array.kind = number<int32_t>(), array.outer_kind = number<int32_t>();
        return array;
    }
};

int main(int, char** paths) {
    FILE* in = fopen(paths[1], "rb");
    FILE* out = fopen(paths[2], "wb");
    fseek(in, 0, SEEK_END);
    std::vector<char> bytes(size_t(ftell(in)));
    rewind(in);
    if (fread(bytes.data(), 1, bytes.size(), in) != bytes.size()) return 1;
    Reader reader{bytes.data()};
    for (int64_t cases = reader.number<int64_t>(); cases--;) {
        Matmul matmul{};
        Matrix& weight = matmul.weight;
        weight.codes = static_cast<const uint8_t*>(reader.block());
        weight.table = static_cast<const float*>(reader.block());
        weight.scales = reader.values(), weight.zeros = reader.values();
        weight.biases = reader.values();
        weight.rows = reader.number<int64_t>(), weight.inputs = reader.number<int64_t>();
        weight.block = reader.number<int64_t>();
        weight.bits = reader.number<int32_t>(), weight.high_first = reader.number<int32_t>();
        matmul.x = static_cast<const float*>(reader.block());
        matmul.tokens = reader.number<int64_t>();
        matmul.quantize_activations = reader.number<int32_t>();
        std::vector<float> y(size_t(matmul.tokens * weight.rows));
        matmul.y = y.data();
        if (qmix_matmul(&matmul, 1, 1, nullptr)) return 1;
        fwrite(y.data(), sizeof(float), y.size(), out);
    }
    return fclose(out);
}
