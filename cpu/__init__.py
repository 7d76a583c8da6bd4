"""One logical processor: VMX unit, local APIC, step loop and the process around it. Imports `bus`."""
