"""`mspc bench`: what compressed models gain in speed and memory, measured beside dense and int4 baselines."""
