// Health prints the health of an object according to Flux and Helm (kstatus) and Argo CD (a Lua script).
//
//	kubectl get gateway plant-1 -o json | health --argocd-script config/argocd/health.lua
//	{"kstatus":{"status":"InProgress","message":"..."},"argocd":{"status":"Progressing","message":"..."}}
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	lua "github.com/yuin/gopher-lua"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type verdict struct {
	Status  string `json:"status"`
	Message string `json:"message"`
}

func main() {
	script := flag.String("argocd-script", "", "the Lua `file` that Argo CD would run; without it only kstatus is asked")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, *script); err != nil {
		fmt.Fprintln(os.Stderr, "health:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, script string) error {
	raw, err := io.ReadAll(in)
	if err != nil {
		return fmt.Errorf("read the object: %w", err)
	}
	// Not encoding/json: kstatus wants integers where the object has them.
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(raw); err != nil {
		return fmt.Errorf("read the object: %w", err)
	}
	verdicts := map[string]verdict{}
	result, err := status.Compute(object)
	if err != nil {
		return fmt.Errorf("kstatus: %w", err)
	}
	verdicts["kstatus"] = verdict{Status: result.Status.String(), Message: result.Message}
	if script != "" {
		if verdicts["argocd"], err = argocd(object.Object, script); err != nil {
			return fmt.Errorf("argocd: %w", err)
		}
	}
	return json.NewEncoder(out).Encode(verdicts)
}

// argocd runs a health script as Argo CD does: the object is the global obj, the script returns a table with status and
// message, and of the standard library it has what Argo CD opens: the base functions, tables, strings and a few others without
// input or output.
func argocd(object map[string]any, script string) (verdict, error) {
	source, err := os.ReadFile(script)
	if err != nil {
		return verdict{}, err
	}
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	libraries := map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage, lua.BaseLibName: lua.OpenBase,
		lua.TabLibName: lua.OpenTable, lua.StringLibName: lua.OpenString, lua.MathLibName: lua.OpenMath,
	}
	for _, name := range []string{lua.LoadLibName, lua.BaseLibName, lua.TabLibName, lua.StringLibName, lua.MathLibName} {
		if err := state.CallByParam(lua.P{Fn: state.NewFunction(libraries[name]), Protect: true}, lua.LString(name)); err != nil {
			return verdict{}, err
		}
	}
	state.SetGlobal("obj", toLua(state, object))
	if err := state.DoString(string(source)); err != nil {
		return verdict{}, err
	}
	table, ok := state.Get(-1).(*lua.LTable)
	if !ok {
		return verdict{}, errors.New("the script returns no table")
	}
	health := verdict{Status: lua.LVAsString(table.RawGetString("status")), Message: lua.LVAsString(table.RawGetString("message"))}
	switch health.Status {
	case "Healthy", "Progressing", "Degraded", "Suspended", "Missing", "Unknown":
		return health, nil
	default:
		return verdict{}, fmt.Errorf("the script returns the status %q, which Argo CD does not know", health.Status)
	}
}

// toLua turns decoded JSON into Lua values, null being nil.
func toLua(state *lua.LState, value any) lua.LValue {
	switch value := value.(type) {
	case bool:
		return lua.LBool(value)
	case string:
		return lua.LString(value)
	case int64:
		return lua.LNumber(value)
	case float64:
		return lua.LNumber(value)
	case []any:
		table := state.NewTable()
		for _, item := range value {
			table.Append(toLua(state, item))
		}
		return table
	case map[string]any:
		table := state.NewTable()
		for key, item := range value {
			table.RawSetString(key, toLua(state, item))
		}
		return table
	default:
		return lua.LNil
	}
}
