"""`mspc bench` measures speed and memory of compressed models, and compares them with dense and int4 baselines."""
