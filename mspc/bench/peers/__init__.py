"""Other engines that decode on a CPU, which `mspc bench` measures in turns with the formats of mspc."""
