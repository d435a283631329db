"""The dtype policy and the compiler for one model on one machine, chosen by timing its training step."""
