"""KVM's VMCS tracking, vCPU threads, the scheduling process and the whole machine. Imports every room."""
