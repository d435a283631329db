"""Dtype policies: named, mapped to layers, or chosen for the hardware."""
