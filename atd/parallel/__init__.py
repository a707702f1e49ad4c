"""One model on several devices: what each of them has, and what they exchange."""
