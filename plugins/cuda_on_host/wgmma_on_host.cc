// The products of a warpgroup: B through its descriptor, and what is under way between their issue and the wait.
#include "wgmma_on_host.h"

#include <exception>

#include "block.h"

namespace gpu {
namespace host {

constexpr int kWarpgroup = 4 * kWarp, kRows = 64, kDepth = 32;

struct Product {
    int n;
    std::vector<int> sums;       // [kRows][n]
    std::vector<Touched*> read;  // words of B
    int waiting;                 // threads that have not waited for it
};

namespace {

// The matrix descriptor: bits 0 - 13 where it starts, 16 - 29 the leading and 32 - 45 the stride dimension's offset, all in 16
// bytes, 49 - 51 the base offset, 62 - 63 how pieces of 16 bytes are swizzled.
struct Matrix {
    size_t start, leading, stride;
    int base_offset, row_bytes;  // row_bytes: what is swizzled together of a row; 16: not swizzled

    explicit Matrix(uint64_t descriptor)
        : start((descriptor & 0x3FFF) << 4),
          leading((descriptor >> 16 & 0x3FFF) << 4),
          stride((descriptor >> 32 & 0x3FFF) << 4),
          base_offset(static_cast<int>(descriptor >> 49 & 7)) {
        constexpr int bytes[] = {16, 128, 64, 32};
        row_bytes = bytes[descriptor >> 62];
    }

    // Where piece `piece` (0, 1) of the 32 bytes of column n lies. Columns stand in groups of 8, `stride` apart; a column's
    // pieces lie side by side in a row of the swizzle, or without one `leading` apart. The swizzle exchanges pieces by the
    // address itself: its bits from 4 on by those from 7 on, as many as number the pieces of a row.
    size_t address(int n, int piece) const {
        const size_t group = start + n / 8 * stride;
        if (row_bytes == 16) return group + n % 8 * 16 + piece * leading;
        const size_t linear = group + n % 8 * row_bytes + 16 * piece;
        return linear ^ (linear >> 7 & (row_bytes / 16 - 1)) << 4;
    }
};

// The 16 bytes of shared memory from an address.
const unsigned char* read_piece(size_t address, Product& product, Place place) {
    for (auto& [name, array] : block->arrays) {
        if (address < array.address || address + 16 > array.address + array.bytes.size()) continue;
        const size_t at = address - array.address;
        for (size_t i = 0; i < 16; i += array.grain) {
            Touched& touched = array.touched[(at + i) / array.grain];
            if (touched.in_flight) mistake("multiplies bytes of a copy_async that was not waited for", place);
            if (!touched.written) mistake("multiplies shared memory that nobody wrote", place);
            const std::string writer = std::to_string(touched.writer);
            if (touched.write_epoch == block->epoch)
                mistake("multiplies what thread " + writer + " writes (a barrier is missing)", place);
            const std::vector<unsigned>& fences = block->fibers[touched.writer].proxy_fences;
            if (fences.size() <= touched.fences || fences[touched.fences] == block->epoch)
                mistake("multiplies what thread " + writer +
                            " wrote without fence_async_proxy before the barrier",
                        place);
            ++touched.products;
            product.read.push_back(&touched);
        }
        return array.bytes.data() + at;
    }
    mistake("multiplies bytes outside of every shared array", place);
}

struct Operands {
    uint32_t rows[4];
    uint64_t descriptor;
};

// Of the warpgroup that begins with thread `first`; B is read now, and must stay as it is until all have waited.
std::shared_ptr<Product> multiplied(const Fiber* threads, int n, Place place) {
    const auto operands = [&](int thread) -> const Operands& {
        return *static_cast<const Operands*>(threads[thread].in);
    };
    const Matrix matrix(operands(0).descriptor);
    for (int thread = 1; thread < kWarpgroup; ++thread)
        if (operands(thread).descriptor != operands(0).descriptor)
            mistake("and others of its warpgroup name different matrices", place);
    if (matrix.base_offset)
        mistake("names a matrix with a base offset, which the emulator does not know", place);
    if (matrix.row_bytes > 16 && (matrix.start % (8 * matrix.row_bytes) + kDepth > matrix.row_bytes + 0u))
        mistake("names a matrix that does not begin with a row of its swizzle", place);

    int8_t a[kRows][kDepth];
    for (int thread = 0; thread < kWarpgroup; ++thread)
        for (int r = 0; r < 4; ++r) {
            const int row = thread / kWarp * 16 + thread % kWarp / 4 + 8 * (r % 2);
            std::memcpy(&a[row][4 * (thread % 4) + 16 * (r / 2)], &operands(thread).rows[r], 4);
        }
    auto product = std::make_shared<Product>();
    product->n = n;
    product->waiting = kWarpgroup;
    product->sums.resize(kRows * n);
    for (int column = 0; column < n; ++column) {
        int8_t b[kDepth];
        for (int piece = 0; piece < 2; ++piece)
            std::memcpy(b + 16 * piece, read_piece(matrix.address(column, piece), *product, place), 16);
        for (int row = 0; row < kRows; ++row) {
            int sum = 0;
            for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k];
            product->sums[row * n + column] = sum;
        }
    }
    return product;
}

// The thread's sums of a product, which has arrived.
void arrive(const Share& share) {
    Product& product = *share.product;
    const int thread = block->running->id % kWarpgroup;
    for (int r = 0; r < product.n / 2; ++r) {
        const int row = thread / kWarp * 16 + thread % kWarp / 4 + r / 2 % 2 * 8;
        share.sums[r] += product.sums[row * product.n + r / 4 * 8 + thread % 4 * 2 + r % 2];
    }
    --share.of_sums->products;
    --share.of_rows->products;
    if (--product.waiting) return;
    for (Touched* touched : product.read) {
        --touched->products;
        touched->reader = -2;  // for others it is a read of now: a barrier must follow before they write
        touched->read_epoch = block->epoch;
    }
}

// All warps of a warpgroup, or all lanes of a warp, come to this place.
void meet(int size, Place place) {
    together(size, nullptr, nullptr, place, [](Fiber*) {});
}

}  // namespace

Registers::Registers() : fences(block->running->register_fences) {}

Registers::~Registers() noexcept(false) {
    if (!std::uncaught_exceptions()) check_registers(*this, "leaves registers", block->running->place);
}

void check_registers(const Registers& registers, const char* what, Place place) {
    if (registers.products) mistake(std::string(what) + " of a wgmma that was not waited for", place);
}

void write_registers(Registers& registers, Place place) {
    check_registers(registers, "changes registers", place);
    registers.fences = block->running->register_fences;
}

uint64_t shared_address(const Array& array, int64_t byte) { return array.address + byte; }

void wgmma(int n, int* sums, Registers& of_sums, const uint32_t* rows, Registers& of_rows,
           uint64_t descriptor, Place place) {
    Fiber& me = *block->running;
    if (block->fibers.size() % kWarpgroup)
        mistake("multiplies in a block that is not of whole warpgroups", place);
    if (of_sums.fences == me.register_fences || of_rows.fences == me.register_fences)
        mistake("multiplies registers that were written and not fenced since", place);
    const Operands mine{{rows[0], rows[1], rows[2], rows[3]}, descriptor};
    std::shared_ptr<Product> product;
    together(kWarpgroup, &mine, &product, place, [&](Fiber* threads) {
        const std::shared_ptr<Product> made = multiplied(threads, n, place);
        for (int i = 0; i < kWarpgroup; ++i) *static_cast<std::shared_ptr<Product>*>(threads[i].out) = made;
    });
    ++of_sums.products;
    ++of_rows.products;
    me.open_products.push_back({product, sums, &of_sums, &of_rows});
}

void wgmma_wait(int left, Place place) {
    meet(kWarp, place);
    std::vector<std::vector<Share>>& groups = block->running->product_groups;
    while (groups.size() > static_cast<size_t>(left)) {
        for (const Share& share : groups.front()) arrive(share);
        groups.erase(groups.begin());
    }
}

}  // namespace host

void fence_async_proxy() { host::block->running->proxy_fences.push_back(host::block->epoch); }

void wgmma_fence(const char* file, int line) {
    host::meet(host::kWarp, {file, line});
    ++host::block->running->register_fences;
}

void wgmma_commit(const char* file, int line) {
    host::meet(host::kWarp, {file, line});
    host::Fiber& me = *host::block->running;
    me.product_groups.push_back(std::move(me.open_products));
    me.open_products.clear();
}

}  // namespace gpu
