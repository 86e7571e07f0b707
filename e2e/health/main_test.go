package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

const script = "../../config/argocd/health.lua"

// object is a Pipeline of generation 2 with the given spec and status.
func object(spec, status string) string {
	return `{"apiVersion":"fleetwright.io/v1alpha1","kind":"Pipeline","metadata":{"name":"p","namespace":"n","generation":2},"spec":` +
		spec + `,"status":` + status + `}`
}

func condition(kind, status, observed string) string {
	return `{"type":"` + kind + `","status":"` + status + `","reason":"Because","message":"` + kind + ` says so","observedGeneration":` + observed + `}`
}

func conditions(observed string, items ...string) string {
	return `{"observedGeneration":` + observed + `,"conditions":[` + strings.Join(items, ",") + `]}`
}

func TestVerdicts(t *testing.T) {
	deleted := strings.Replace(object(`{}`, conditions("2", condition("Ready", "True", "2"))),
		`"generation":2`, `"generation":2,"deletionTimestamp":"2026-01-01T00:00:00Z"`, 1)
	tests := []struct {
		name, object, kstatus, argocd, message string
	}{
		{"ready", object(`{}`, conditions("2", condition("Ready", "True", "2"))), "Current", "Healthy", "Ready says so"},
		{"never seen", object(`{}`, `{"observedGeneration":-1}`), "InProgress", "Progressing", "the operator has not seen this generation yet"},
		{"changed since", object(`{}`, conditions("1", condition("Ready", "True", "1"))), "InProgress", "Progressing", "the operator has not seen this generation yet"},
		{"ready of an older generation", object(`{}`, conditions("2", condition("Ready", "True", "1"), condition("Reconciling", "True", "2"))), "InProgress", "Progressing", "Reconciling says so"},
		{"reconciling", object(`{}`, conditions("2", condition("Ready", "False", "2"), condition("Reconciling", "True", "2"))), "InProgress", "Progressing", "Reconciling says so"},
		{"stalled", object(`{}`, conditions("2", condition("Ready", "False", "2"), condition("Stalled", "True", "2"))), "Failed", "Degraded", "Stalled says so"},
		{"paused", object(`{"paused":true}`, conditions("2", condition("Ready", "True", "2"))), "Current", "Suspended", "spec.paused is true"},
		{"being deleted", deleted, "Terminating", "Progressing", "being deleted"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var out bytes.Buffer
			if err := run(strings.NewReader(test.object), &out, script); err != nil {
				t.Fatal(err)
			}
			var got map[string]verdict
			if err := json.Unmarshal(out.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if got["kstatus"].Status != test.kstatus {
				t.Errorf("kstatus: got %+v, want %s", got["kstatus"], test.kstatus)
			}
			if want := (verdict{test.argocd, test.message}); got["argocd"] != want {
				t.Errorf("argocd: got %+v, want %+v", got["argocd"], want)
			}
		})
	}
}
