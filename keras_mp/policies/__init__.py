"""The dtype policy in force: named, mapped to layers, or chosen for the hardware."""
