"""The runtime of a pod: sessions, stations, SousChefs, Gatekeeper, Engines. `pod` wires them together."""
