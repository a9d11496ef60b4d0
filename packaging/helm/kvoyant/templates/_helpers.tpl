{{- define "kvoyant.name" -}}
{{- printf "%s" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "kvoyant.selector" -}}
app.kubernetes.io/name: kvoyant
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kvoyant.labels" -}}
{{ include "kvoyant.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Classic CUDA IPC is the one thing that needs the node's namespaces. */}}
{{- define "kvoyant.classic" -}}
{{- if and .Values.gpu.enabled (eq .Values.gpu.export "handle") }}true{{ end -}}
{{- end -}}

{{/* A value as TOML has it: as JSON, but for tables. */}}
{{- define "kvoyant.toml" -}}
{{- if kindIs "map" . -}}
{ {{- $first := true }}{{ range $key, $value := . }}{{ if not $first }}, {{ end }}{{ $first = false }}{{ $key | quote }} = {{ include "kvoyant.toml" $value }}{{ end -}} }
{{- else -}}
{{ . | toJson }}
{{- end -}}
{{- end -}}
