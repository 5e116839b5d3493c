"""One model on two machines: an edge with the lower blocks and the exits, a cloud with the rest. Knows no trainer."""
