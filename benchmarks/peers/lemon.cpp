// Transposable masks through LEMON's network simplex: rows supply n, columns demand n, an arc of capacity 1 for each entry.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <lemon/network_simplex.h>
#include <lemon/smart_graph.h>

using Graph = lemon::SmartDigraph;
using Simplex = lemon::NetworkSimplex<Graph, int, std::int64_t>;

// The largest weight of a tile, as an integer: sums of a tile's costs stay far inside 64 bits.
static constexpr double kLargest = 1099511627776.0;  // 2^40

extern "C" long solve_tiles(const float* tiles, unsigned char* masks, long count, int m, int n) {
    Graph graph;
    std::vector<Graph::Node> rows, columns;
    for (int i = 0; i < m; ++i) rows.push_back(graph.addNode());
    for (int j = 0; j < m; ++j) columns.push_back(graph.addNode());
    std::vector<Graph::Arc> arcs;
    for (const auto& row : rows)
        for (const auto& column : columns) arcs.push_back(graph.addArc(row, column));

    // The network is built once, for all tiles; only its costs change.
    Graph::ArcMap<int> capacity(graph, 1);
    Graph::ArcMap<std::int64_t> cost(graph, 0);
    Graph::NodeMap<int> supply(graph);
    for (const auto& row : rows) supply[row] = n;
    for (const auto& column : columns) supply[column] = -n;
    Simplex simplex(graph);
    simplex.upperMap(capacity).supplyMap(supply);

    long unsolved = 0;
    const int entries = m * m;
    for (long tile = 0; tile < count; ++tile) {
        const float* weights = tiles + tile * entries;
        float largest = 0;
        for (int k = 0; k < entries; ++k) largest = std::max(largest, std::fabs(weights[k]));
        const double unit = largest > 0 ? kLargest / largest : 0.0;
        for (int k = 0; k < entries; ++k) cost[arcs[k]] = -std::llround(std::fabs(weights[k]) * unit);
        unsolved += simplex.costMap(cost).run() != Simplex::OPTIMAL;
        for (int k = 0; k < entries; ++k) masks[tile * entries + k] = simplex.flow(arcs[k]) > 0;
    }
    return unsolved;
}
