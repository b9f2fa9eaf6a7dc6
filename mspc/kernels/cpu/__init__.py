"""Products on a CPU in C++: a library with one file for each instruction set, and the functions of `Kernel` around it."""
