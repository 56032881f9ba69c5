"""A PTX interpreter: what a GPU would compute with the code that Triton compiled, without a GPU.

It runs the sm_80 PTX of our Triton kernels in numpy, so that inline assembly, layouts, matrix
instructions and asynchronous copies are tested together on a CPU. `device.Device` lets Triton
launch on it: kernels are specialized, compiled and called as on a GPU, with tensors of the CPU.

It refuses what a GPU would do silently: an instruction that it does not know, a register or shared
memory that nothing wrote, an address outside the tensors, a misaligned address, shared memory that
is read before its copy was waited for or without a barrier after another thread's write.

    errors      what it refuses
    source      PTX text -> blocks of instructions
    operations  instructions that compute a lane's value from that lane's values
    packed      the same on two 16-bit floats, and conversions between formats
    warp        instructions that exchange values between the lanes of a warp
    memory      global memory: the tensors of a launch
    order       barriers, and who may rely on whose stores to global memory
    shared      shared memory, and who wrote and read it since which barrier
    lanes       registers of all lanes, and which lanes an instruction runs for
    access      instructions that read and write memory, and barriers
    machine     blocks of instructions, in all lanes of several thread blocks at once
    device      the driver that Triton sees

It knows nothing of time, of the assembler behind PTX, and of sm_90's instructions: wgmma, TMA,
mbarrier and clusters are unknown instructions here.

Reference: PTX ISA 8.7, https://docs.nvidia.com/cuda/parallel-thread-execution/.
"""
