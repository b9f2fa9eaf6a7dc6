"""Products on a CPU in C++: a library with a file for each instruction set, and the functions of `Kernel` around it."""
